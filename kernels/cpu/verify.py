"""Verification on the CPU: one head of one row over a window of tokens, of which a prefix may turn out to count.

Rows of the state do not depend on one another: each is loaded once, folded, written, and taken through all tokens of
the window while it is in the first-level cache. Order and kind of operations are those of `decode.py` for each token,
so that float32 results are the same bit by bit.
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
    copy,
    fill_zero,
    finish,
    flag_nonfinite,
    fold_row,
    load_history,
    load_tokens,
    locate,
    parameter,
    prepare,
    record_address,
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


@njit
def _keep(params, places, D, end, window, num_rows, features, length):
    """Complete a slot whose state and whose records' u are written: k and d of each token, and the history."""
    size = 4 * D
    for t in range(length):
        record = record_address(params, places, D, t)
        copy(features + (4 * t + 1) * size, record + size, size)
        copy(features + (4 * t + 3) * size, record + 2 * size, size)
    store_history(params, places, D, end, window, num_rows)


@njit(forceinline=True)
def verify_task(params, n, h, D, scratch):
    """Run head h of row n; the last row's tasks clear what belongs to nobody."""
    bounds = parameter(params, Field.CU_SEQLENS) + 4 * n
    begin = load_int32(bounds)
    if n == parameter(params, Field.N):
        for padding in range(begin, parameter(params, Field.T)):
            clear_output(params, padding, h, D)
        return
    length = load_int32(bounds + 4) - begin
    write = slot_or_null(params, load_int32(parameter(params, Field.WRITE_SLOT) + 4 * n))
    second = slot_or_null(params, load_int32(parameter(params, Field.SECOND_SLOT) + 4 * n))
    read = slot_or_null(params, load_int32(parameter(params, Field.READ_SLOT) + 4 * n))
    position = load_int64(parameter(params, Field.POSITION) + 8 * n)
    count = load_int32(parameter(params, Field.NUM_FOLD) + 4 * n)
    if write == 0:
        for t in range(length):
            clear_output(params, begin + t, h, D)
        return
    size, num_past = 4 * D, parameter(params, Field.W) - 1
    window = scratch
    features = window + (MAX_PAST + TILE) * 3 * size
    betas = features + TILE * 4 * size
    products = betas + 4 * TILE  # of a token: d·k, d·q
    dots = products + TILE * 2 * size  # of a token: k·q
    outputs = dots + 4 * TILE
    row = outputs + TILE * size
    places = kept = also = row + size
    locate(params, write, h, places)
    if read != write and read != 0:
        kept = places + 8 * D
        locate(params, read, h, kept)
    if second != 0:
        also = places + 16 * D
        locate(params, second, h, also)

    load_history(params, read, kept, D, position, window)
    load_tokens(params, begin, length, h, D, window + num_past * 3 * size)
    prepare(params, begin, length, h, D, window, features, betas)
    for t in range(length):
        q, k, d = features + 4 * t * size, features + (4 * t + 1) * size, features + (4 * t + 3) * size
        p, r = products + 2 * t * size, products + (2 * t + 1) * size
        kq = splat(_ZERO)
        for c in range(0, size, VECTOR_BYTES):
            kq = fma(load(k + c), load(q + c), kq)
            store(p + c, load(d + c) * load(k + c))
            store(r + c, load(d + c) * load(q + c))
        store_scalar(dots + 4 * t, total(kq))

    rows = D // parameter(params, Field.PIECES)
    for i in range(D):
        within = i % rows * size
        if read == 0:
            fill_zero(row, size)
        else:
            copy(load_int64(kept + 8 * (i // rows)) + within, row, size)
            fold_row(params, kept, D, i, count, row)
        copy(row, load_int64(places + 8 * (i // rows)) + within, size)
        if second != 0:
            copy(row, load_int64(also + 8 * (i // rows)) + within, size)
        for t in range(length):
            k, v, d = features + (4 * t + 1) * size, features + (4 * t + 2) * size, features + (4 * t + 3) * size
            p, r = products + 2 * t * size, products + (2 * t + 1) * size
            s_k, s_q = splat(_ZERO), splat(_ZERO)
            for c in range(0, size, VECTOR_BYTES):
                s = load(row + c)
                s_k = fma(s, load(p + c), s_k)
                s_q = fma(s, load(r + c), s_q)
            u = load_scalar(betas + 4 * t) * (load_scalar(v + 4 * i) - total(s_k))
            # Element i of the old record has just been folded, and nobody needs it any more.
            store_scalar(record_address(params, places, D, t) + 4 * i, u)
            if second != 0:
                store_scalar(record_address(params, also, D, t) + 4 * i, u)
            store_scalar(outputs + t * size + 4 * i, total(s_q) + u * load_scalar(dots + 4 * t))
            for c in range(0, size, VECTOR_BYTES):
                store(row + c, fma(load(row + c), load(d + c), splat(u) * load(k + c)))

    end = position + length
    if read == write:
        _keep(params, places, D, end, window + num_past * 3 * size, length, features, length)
    else:
        _keep(params, places, D, end, window + 3 * size, num_past - 1 + length, features, length)
    if second != 0:
        _keep(params, also, D, end, window + 3 * size, num_past - 1 + length, features, length)
    for t in range(length):
        sick = finish(params, begin + t, h, D, outputs + t * size)
        flag_nonfinite(params, write, sick, t)
        if second != 0:
            flag_nonfinite(params, second, sick, t)
