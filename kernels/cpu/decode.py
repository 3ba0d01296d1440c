"""Decode on the CPU: one head of one row by one token, in one pass over its state.

Both products of the old state are taken while a row of it is in the first-level cache, S·(d·k) and S·(d·q);
the new row follows at once. Memory bounds it: 128 KiB of state traffic per head with D=128.
"""
# mypy: disallow-untyped-defs=false
# Compiled functions have numba's types; an address, an index and a count would all be annotated "int".

from __future__ import annotations

import numpy as np
from numba import njit

from kimi_vllm.kernels.cpu.head import (
    MAX_PAST,
    TILE,
    Field,
    clear_output,
    finish,
    flag_nonfinite,
    load_history,
    load_tokens,
    locate,
    parameter,
    prepare,
    slot_or_null,
    store_history,
)
from kimi_vllm.kernels.cpu.simd import (
    VECTOR_BYTES,
    fma,
    load,
    load_int32,
    load_int64,
    load_scalar,
    splat,
    store,
    store_scalar,
    total,
)

_ZERO = np.float32(0)


@njit(forceinline=True)
def decode_task(params, n, h, D, scratch):
    """Advance head h of row n by one token."""
    W = parameter(params, Field.W)
    write = slot_or_null(params, load_int32(parameter(params, Field.WRITE_SLOT) + 4 * n))
    read = slot_or_null(params, load_int32(parameter(params, Field.READ_SLOT) + 4 * n))
    position = load_int64(parameter(params, Field.POSITION) + 8 * n)
    if write == 0:
        clear_output(params, n, h, D)
        return
    row_bytes = 4 * D
    window = scratch
    q = window + (MAX_PAST + TILE) * 3 * row_bytes
    k, v, d = q + row_bytes, q + 2 * row_bytes, q + 3 * row_bytes
    p, r, o, betas = q + 4 * row_bytes, q + 5 * row_bytes, q + 6 * row_bytes, q + 7 * row_bytes
    places = kept = q + 8 * row_bytes
    locate(params, write, h, places)
    if read != write and read != 0:
        kept = places + 8 * D
        locate(params, read, h, kept)
    load_history(params, read, kept, D, position, window)
    load_tokens(params, n, 1, h, D, window + (W - 1) * 3 * row_bytes)
    prepare(params, n, 1, h, D, window, q, betas)
    if read == write:
        store_history(params, places, D, position + 1, window + (W - 1) * 3 * row_bytes, 1)
    else:
        store_history(params, places, D, position + 1, window + 3 * row_bytes, W - 1)

    kq = splat(_ZERO)
    for c in range(0, row_bytes, VECTOR_BYTES):
        kq = fma(load(k + c), load(q + c), kq)
        store(p + c, load(d + c) * load(k + c))
        store(r + c, load(d + c) * load(q + c))
    dot_kq, beta = total(kq), load_scalar(betas)
    pieces = parameter(params, Field.PIECES)
    rows = D // pieces
    for piece in range(pieces):
        source, target = load_int64(kept + 8 * piece), load_int64(places + 8 * piece)
        for i in range(piece * rows, (piece + 1) * rows):
            if read == 0:
                u = beta * load_scalar(v + 4 * i)
                store_scalar(o + 4 * i, u * dot_kq)
                for c in range(0, row_bytes, VECTOR_BYTES):
                    store(target + c, splat(u) * load(k + c))
            else:
                s_k, s_q = splat(_ZERO), splat(_ZERO)
                for c in range(0, row_bytes, VECTOR_BYTES):
                    s = load(source + c)
                    s_k = fma(s, load(p + c), s_k)
                    s_q = fma(s, load(r + c), s_q)
                u = beta * (load_scalar(v + 4 * i) - total(s_k))
                store_scalar(o + 4 * i, total(s_q) + u * dot_kq)
                for c in range(0, row_bytes, VECTOR_BYTES):
                    store(target + c, fma(load(source + c), load(d + c), splat(u) * load(k + c)))
            source += row_bytes
            target += row_bytes
    flag_nonfinite(params, write, finish(params, n, h, D, o))
