"""Prefill on the CPU: one head of one sequence, tile after tile of sixteen tokens.

The state is walked four rows at a time, two tokens per walk, so that arithmetic and not the cache bounds
it. On a CPU the recurrence needs fewer operations than the chunk form and no small matrix products;
NOTES.md has the numbers.
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
    slot_or_null,
    store_history,
)
from kimi_vllm.kernels.cpu.simd import (
    VECTOR_BYTES,
    fma,
    lane,
    load,
    load_int32,
    load_int64,
    load_quad,
    load_scalar,
    quad,
    splat,
    store,
    store_int64,
    store_quad,
    store_scalar,
    total,
    totals,
)

_ZERO, _ONE = np.float32(0), np.float32(1)


@njit
def _null_token(D, row, beta):
    """Make a token that changes nothing: it completes the last pair."""
    fill_zero(row, 12 * D)
    for c in range(12 * D, 16 * D, VECTOR_BYTES):
        store(row + c, splat(_ONE))
    store_scalar(beta, _ZERO)


@njit
def _join_pair(D, first_row, record, scalars, betas):
    """Merge two consecutive tokens, so that the state is read and written once for both.

    With a decay d and keys k: S2 = S·d1·d2 + u1·(k1·d2) + u2·k2. Both tokens' products with S are then
    taken at once, and what token 1 adds to those of token 2 follows from inner products of vectors. No
    factor exceeds 1.
    """
    size = 4 * D
    q1, k1, d1 = first_row, first_row + size, first_row + 3 * size
    q2, k2, d2 = first_row + 4 * size, first_row + 5 * size, first_row + 7 * size
    kq1, kq2, kk, k1q2 = splat(_ZERO), splat(_ZERO), splat(_ZERO), splat(_ZERO)
    for c in range(0, size, VECTOR_BYTES):
        d = load(d1 + c) * load(d2 + c)
        k1_later = load(k1 + c) * load(d2 + c)
        store(record + c, load(d1 + c) * load(k1 + c))
        store(record + size + c, load(d1 + c) * load(q1 + c))
        store(record + 2 * size + c, d * load(k2 + c))
        store(record + 3 * size + c, d * load(q2 + c))
        store(record + 4 * size + c, d)
        store(record + 5 * size + c, k1_later)
        store(record + 6 * size + c, load(k2 + c))
        kq1 = fma(load(k1 + c), load(q1 + c), kq1)
        kq2 = fma(load(k2 + c), load(q2 + c), kq2)
        kk = fma(k1_later, load(k2 + c), kk)
        k1q2 = fma(k1_later, load(q2 + c), k1q2)
    store_scalar(scalars, load_scalar(betas))
    store_scalar(scalars + 4, load_scalar(betas + 4))
    store_scalar(scalars + 8, total(kq1))
    store_scalar(scalars + 12, total(kq2))
    store_scalar(scalars + 16, total(kk))
    store_scalar(scalars + 20, total(k1q2))


@njit
def _advance(D, num_pairs, state, features, records, scalars, outputs):
    """Run the pairs of a tile over the state, four of its rows at a time; write one output row per token."""
    size = 4 * D
    z = splat(_ZERO)
    for i in range(0, D, 4):
        s = state + i * size
        for pair in range(num_pairs):
            f, x = records + 7 * pair * size, scalars + 24 * pair
            a0, a1, a2, a3, b0, b1, b2, b3 = z, z, z, z, z, z, z, z
            e0, e1, e2, e3, g0, g1, g2, g3 = z, z, z, z, z, z, z, z
            for c in range(0, size, VECTOR_BYTES):
                p1, r1 = load(f + c), load(f + size + c)
                p2, r2 = load(f + 2 * size + c), load(f + 3 * size + c)
                s0, s1 = load(s + c), load(s + size + c)
                s2, s3 = load(s + 2 * size + c), load(s + 3 * size + c)
                a0, a1, a2, a3 = fma(s0, p1, a0), fma(s1, p1, a1), fma(s2, p1, a2), fma(s3, p1, a3)
                b0, b1, b2, b3 = fma(s0, r1, b0), fma(s1, r1, b1), fma(s2, r1, b2), fma(s3, r1, b3)
                e0, e1, e2, e3 = fma(s0, p2, e0), fma(s1, p2, e1), fma(s2, p2, e2), fma(s3, p2, e3)
                g0, g1, g2, g3 = fma(s0, r2, g0), fma(s1, r2, g1), fma(s2, r2, g2), fma(s3, r2, g3)
            sums = totals((a0, a1, a2, a3, b0, b1, b2, b3, e0, e1, e2, e3, g0, g1, g2, g3))
            beta1, beta2 = splat(load_scalar(x)), splat(load_scalar(x + 4))
            kq1, kq2 = splat(load_scalar(x + 8)), splat(load_scalar(x + 12))
            kk, k1q2 = splat(load_scalar(x + 16)), splat(load_scalar(x + 20))
            v = features + pair * 8 * size + 2 * size + 4 * i
            o = outputs + pair * 2 * size + 4 * i
            u1 = beta1 * (load_quad(v) - quad(sums, 0))
            u2 = beta2 * (load_quad(v + 4 * size) - quad(sums, 2) - u1 * kk)
            store_quad(o, fma(u1, kq1, quad(sums, 1)))
            store_quad(o + size, fma(u1, k1q2, fma(u2, kq2, quad(sums, 3))))
            y0, y1, y2, y3 = lane(u1, 0), lane(u1, 1), lane(u1, 2), lane(u1, 3)
            m0, m1, m2, m3 = lane(u2, 0), lane(u2, 1), lane(u2, 2), lane(u2, 3)
            for c in range(0, size, VECTOR_BYTES):
                d, k1, k2 = load(f + 4 * size + c), load(f + 5 * size + c), load(f + 6 * size + c)
                t0, t1, t2, t3 = s + c, s + size + c, s + 2 * size + c, s + 3 * size + c
                store(t0, fma(load(t0), d, fma(y0, k1, m0 * k2)))
                store(t1, fma(load(t1), d, fma(y1, k1, m1 * k2)))
                store(t2, fma(load(t2), d, fma(y2, k1, m2 * k2)))
                store(t3, fma(load(t3), d, fma(y3, k1, m3 * k2)))


@njit
def _table_slot(params, n, block):
    """Return the slot of a block of sequence n; 0 and a note for the caller if there is no such entry."""
    if block >= parameter(params, Field.B):
        store_int64(params + 8 * Field.BAD_SLOT, 1)
        return 0
    row = parameter(params, Field.SLOT_TABLE) + n * parameter(params, Field.SLOT_TABLE_STRIDE)
    return slot_or_null(params, load_int32(row + 4 * block))


@njit
def _load_state(params, places, D, state):
    """Gather a head's matrix from its units."""
    pieces = parameter(params, Field.PIECES)
    num_bytes = D // pieces * 4 * D
    for piece in range(pieces):
        copy(load_int64(places + 8 * piece), state + piece * num_bytes, num_bytes)


@njit
def _store_state(params, places, D, state):
    """Scatter a head's matrix over its units."""
    pieces = parameter(params, Field.PIECES)
    num_bytes = D // pieces * 4 * D
    for piece in range(pieces):
        copy(state + piece * num_bytes, load_int64(places + 8 * piece), num_bytes)


@njit(forceinline=True)
def prefill_task(params, n, h, D, scratch):
    """Run head h of sequence n over its new tokens."""
    bounds = parameter(params, Field.CU_SEQLENS) + 4 * n
    row = load_int32(bounds)
    if n == parameter(params, Field.N):
        for padding in range(row, parameter(params, Field.T)):
            clear_output(params, padding, h, D)
        return
    length = load_int32(bounds + 4) - row
    if length <= 0:
        return
    position = load_int32(parameter(params, Field.CONTEXT_LEN) + 4 * n)
    end = position + length
    num_past, block_size = parameter(params, Field.W) - 1, parameter(params, Field.BLOCK_SIZE)
    size = 4 * D
    window = scratch
    features = window + (MAX_PAST + TILE) * 3 * size
    betas = features + TILE * 4 * size
    records = betas + 4 * TILE
    scalars = records + TILE // 2 * 7 * size
    outputs = scalars + TILE // 2 * 24
    state = outputs + TILE * size
    places = state + D * size

    read = 0
    if position > 0:
        read = _table_slot(params, n, (position - 1) // block_size)
    if read == 0:
        fill_zero(state, D * size)
    else:
        locate(params, read, h, places)
        _load_state(params, places, D, state)
        counts = parameter(params, Field.NUM_FOLD)
        if counts != 0:
            count = load_int32(counts + 4 * n)
            for i in range(D):
                fold_row(params, places, D, i, count, state + i * size)
    load_history(params, read, places, D, position, window)

    sick = _ZERO
    while position < end:
        # The next boundary somebody wants; the tile before it may be shorter.
        block = position // block_size
        slot = _table_slot(params, n, block)
        while slot == 0 and (block + 1) * block_size < end:
            block += 1
            slot = _table_slot(params, n, block)
        boundary = min((block + 1) * block_size, end)
        while position < boundary:
            count = min(TILE, boundary - position)
            load_tokens(params, row, count, h, D, window + num_past * 3 * size)
            prepare(params, row, count, h, D, window, features, betas)
            if count % 2:
                _null_token(D, features + count * 4 * size, betas + 4 * count)
            num_pairs = (count + 1) // 2
            for pair in range(num_pairs):
                _join_pair(
                    D,
                    features + pair * 8 * size,
                    records + pair * 7 * size,
                    scalars + pair * 24,
                    betas + pair * 8,
                )
            _advance(D, num_pairs, state, features, records, scalars, outputs)
            for t in range(count):
                sick += finish(params, row + t, h, D, outputs + t * size)
            copy(window + count * 3 * size, window, num_past * 3 * size)
            row += count
            position += count
        if slot != 0:
            locate(params, slot, h, places)
            _store_state(params, places, D, state)
            store_history(params, places, D, position, window, num_past)
            flag_nonfinite(params, slot, sick)
