"""One head's tokens on the CPU: from projections to q, k, v and decay, and from the output to its norm.

Memory is passed as addresses in a block of int64 parameters (`Field`), which `host.py` fills. A *window* is
the raw projections of consecutive tokens of one head, W-1 past ones first, ``3·D`` floats each. The *places* of a
head are the addresses of its units in one slot.
"""
# mypy: disallow-untyped-defs=false
# Compiled functions have numba's types; an address, an index and a count would all be annotated "int".

from __future__ import annotations

import math
from enum import IntEnum

import numpy as np
from numba import njit

from kimi_vllm.kernels.cpu.math import (
    decay,
    load_as,
    load_scalar_as,
    round_as,
    sigmoid,
    store_as,
)
from kimi_vllm.kernels.cpu.simd import (
    LANES,
    VECTOR_BYTES,
    first,
    fma,
    load,
    load_int32,
    load_int64,
    load_scalar,
    splat,
    store,
    store_int32,
    store_int64,
    store_scalar,
    total,
)

_ZERO, _ONE, _L2_EPS = np.float32(0), np.float32(1), np.float32(1e-6)

TILE = 16
"""Tokens prepared at a time in prefill: they fit the first-level cache beside four rows of the state."""
MAX_PAST = 7
"""The widest convolution has eight taps."""


class Field(IntEnum):
    """Where each parameter lies in the block. Strides are in bytes, `NORM_EPS` is the bits of a float32."""

    QKV, QKV_STRIDE, GATE, GATE_STRIDE, BETA, BETA_STRIDE = range(6)
    OUT_GATE, OUT_GATE_STRIDE, OUT, OUT_STRIDE = range(6, 10)
    DTYPE, CONV_WEIGHT, W, A_LOG, DT_BIAS, NORM_WEIGHT, NORM_EPS, H, D, N = range(10, 20)
    R, PIECES, VECTORS, RECORDS, FLAGS, UNITS, UNIT_BYTES, BLOCK_BYTES, FIRST_UNIT = range(20, 29)
    MEMORY, PAGES, PAGES_STRIDE, S, NONFINITE, SCRATCH, SCRATCH_STRIDE = range(29, 36)
    READ_SLOT, WRITE_SLOT, POSITION = range(36, 39)
    CU_SEQLENS, CONTEXT_LEN, SLOT_TABLE, SLOT_TABLE_STRIDE, B, BLOCK_SIZE, T = range(39, 46)
    NUM_FOLD, SECOND_SLOT = range(46, 48)
    # Written by the workers, therefore on a cache line of their own.
    NEXT_TASK, NEXT_WORKER, BAD_SLOT = range(48, 51)


NUM_FIELDS = 56


def scratch_bytes(D: int) -> int:
    """Return the scratch memory of one worker for heads of D channels."""
    window = (MAX_PAST + TILE) * 3 * D
    features = TILE * 4 * D + TILE
    pairs = TILE // 2 * (7 * D + 6)
    places = 2 * D  # a head has at most as many units as rows
    return (4 * (window + features + pairs + TILE * D + D * D + places) + 4095) // 4096 * 4096


@njit(forceinline=True)
def parameter(params, field):
    """Return one parameter of the block."""
    return load_int64(params + 8 * field)


@njit(forceinline=True)
def slot_or_null(params, slot):
    """Return the slot; 0, and a note for the caller, if there is no such slot."""
    if slot < 0 or slot >= parameter(params, Field.S):
        store_int64(params + 8 * Field.BAD_SLOT, 1)
        return 0
    return slot


@njit(forceinline=True)
def first_channel(params, h, D, part):
    """Return the first channel of head h within q (0), k (1) or v (2)."""
    return (part * parameter(params, Field.H) + h) * D


@njit(forceinline=True)
def copy(source, target, num_bytes):
    """Copy whole vectors."""
    for c in range(0, num_bytes, VECTOR_BYTES):
        store(target + c, load(source + c))


@njit(forceinline=True)
def fill_zero(target, num_bytes):
    """Write zeros, whole vectors of them."""
    for c in range(0, num_bytes, VECTOR_BYTES):
        store(target + c, splat(_ZERO))


@njit
def locate(params, slot, h, places):
    """Look up the places of head h in a slot."""
    pieces, units = parameter(params, Field.PIECES), parameter(params, Field.UNITS)
    pages = parameter(params, Field.PAGES) + slot * parameter(params, Field.PAGES_STRIDE)
    first_unit = parameter(params, Field.FIRST_UNIT) + h * pieces
    for piece in range(pieces):
        unit = first_unit + piece
        block = load_int32(pages + 4 * (unit // units)) * parameter(params, Field.BLOCK_BYTES)
        within = unit % units * parameter(params, Field.UNIT_BYTES)
        store_int64(places + 8 * piece, parameter(params, Field.MEMORY) + block + within)


@njit(forceinline=True)
def ring_address(params, places, D, vector):
    """Return where a vector of a head's ring lies."""
    vectors = parameter(params, Field.VECTORS)
    rows = D // parameter(params, Field.PIECES)
    return load_int64(places + 8 * (vector // vectors)) + (rows + vector % vectors) * 4 * D


@njit(forceinline=True)
def record_address(params, places, D, t):
    """Return where the record of a window's token t lies: u, k and d, D floats each."""
    records = parameter(params, Field.RECORDS)
    rows = D // parameter(params, Field.PIECES)
    within = rows + parameter(params, Field.VECTORS) + t % records * 3
    return load_int64(places + 8 * (t // records)) + within * 4 * D


@njit(forceinline=True)
def fold_row(params, places, D, i, count, row):
    """Advance row i of a head's matrix, D floats, by the first `count` records of its slot."""
    for t in range(count):
        record = record_address(params, places, D, t)
        u = splat(load_scalar(record + 4 * i))
        k, d = record + 4 * D, record + 8 * D
        for c in range(0, 4 * D, VECTOR_BYTES):
            # As decode does it, so that nothing differs from a token that was not speculated on.
            store(row + c, fma(load(row + c), load(d + c), u * load(k + c)))


@njit
def load_history(params, slot, places, D, position, window):
    """Put the W-1 projections before `position` into the window; zeros where there is no token."""
    num_past = parameter(params, Field.W) - 1
    for row in range(num_past):
        past = position - num_past + row
        column = past % parameter(params, Field.R)
        for part in range(3):
            target = window + (3 * row + part) * 4 * D
            if slot == 0 or past < 0:
                fill_zero(target, 4 * D)
            else:
                copy(ring_address(params, places, D, 3 * column + part), target, 4 * D)


@njit
def store_history(params, places, D, position, window, num_rows):
    """Write `num_rows` window rows, those of the tokens before `position`, into their ring columns."""
    for row in range(num_rows):
        past = position - num_rows + row
        if past >= 0:
            column = past % parameter(params, Field.R)
            for part in range(3):
                target = ring_address(params, places, D, 3 * column + part)
                copy(window + (3 * row + part) * 4 * D, target, 4 * D)


@njit
def load_tokens(params, start, count, h, D, window):
    """Put the projections of `count` tokens into the window, as floats."""
    dtype = parameter(params, Field.DTYPE)
    for t in range(count):
        row = parameter(params, Field.QKV) + (start + t) * parameter(params, Field.QKV_STRIDE)
        for part in range(3):
            target = window + (3 * t + part) * 4 * D
            channel = first_channel(params, h, D, part)
            for c in range(0, D, LANES):
                store(target + 4 * c, load_as(row, channel + c, dtype))


@njit
def prepare(params, start, count, h, D, window, features, betas):
    """Turn a window into q, k, v and decay of each token (4·D floats each) and its write strength."""
    dtype, W = parameter(params, Field.DTYPE), parameter(params, Field.W)
    weight_stride = 12 * parameter(params, Field.H) * D
    minus_rate = np.float32(-math.exp(load_scalar(parameter(params, Field.A_LOG) + 4 * h)))
    bias = parameter(params, Field.DT_BIAS) + 4 * h * D
    scale = _ONE / np.float32(math.sqrt(np.float32(D)))
    for t in range(count):
        row = features + t * 16 * D
        for part in range(3):
            taps = parameter(params, Field.CONV_WEIGHT) + 4 * first_channel(params, h, D, part)
            x = window + (3 * t + part) * 4 * D
            for c in range(0, 4 * D, VECTOR_BYTES):
                y = load(x + c) * load(taps + c)
                for tap in range(1, W):
                    y = fma(load(x + tap * 12 * D + c), load(taps + tap * weight_stride + c), y)
                store(row + part * 4 * D + c, round_as(y * sigmoid(y), dtype))
        for part in range(2):
            x = row + part * 4 * D
            squares = splat(_ZERO)
            for c in range(0, 4 * D, VECTOR_BYTES):
                squares = fma(load(x + c), load(x + c), squares)
            factor = _ONE / np.float32(math.sqrt(total(squares) + _L2_EPS))
            if part == 0:
                factor *= scale
            for c in range(0, 4 * D, VECTOR_BYTES):
                store(x + c, load(x + c) * splat(factor))
        gate = parameter(params, Field.GATE) + (start + t) * parameter(params, Field.GATE_STRIDE)
        for c in range(0, D, LANES):
            d = decay(load_as(gate, h * D + c, dtype), load(bias + 4 * c), minus_rate)
            store(row + 12 * D + 4 * c, d)
        logits = parameter(params, Field.BETA) + (start + t) * parameter(params, Field.BETA_STRIDE)
        store_scalar(betas + 4 * t, first(sigmoid(splat(load_scalar_as(logits, h, dtype)))))


@njit
def finish(params, row, h, D, o):
    """Round the recurrence's output, normalise the head, apply the output gate and write it out (Eq. 10).

    Returns:
        Zero; NaN if an element of the rounded output is not finite, which it is wherever the state is not.
    """
    dtype = parameter(params, Field.DTYPE)
    squares = splat(_ZERO)
    for c in range(0, 4 * D, VECTOR_BYTES):
        x = round_as(load(o + c), dtype)
        store(o + c, x)
        squares = fma(x, x, squares)
    eps = load_scalar(params + 8 * Field.NORM_EPS)
    square = total(squares)
    factor = splat(_ONE / np.float32(math.sqrt(square / np.float32(D) + eps)))
    gate = parameter(params, Field.OUT_GATE) + row * parameter(params, Field.OUT_GATE_STRIDE)
    out = parameter(params, Field.OUT) + row * parameter(params, Field.OUT_STRIDE)
    weight = parameter(params, Field.NORM_WEIGHT)
    for c in range(0, D, LANES):
        x = load(o + 4 * c) * factor * load(weight + 4 * c)
        store_as(out, h * D + c, x * sigmoid(load_as(gate, h * D + c, dtype)), dtype)
    return square * _ZERO


@njit(forceinline=True)
def flag_nonfinite(params, slot, sick, token=0):
    """Set a flag of a slot if the caller asked for flags and `sick`, a sum of what `finish` returned, is NaN."""
    flags = parameter(params, Field.NONFINITE)
    if flags != 0 and sick != _ZERO:
        store_int32(flags + 4 * (slot * parameter(params, Field.FLAGS) + token), 1)


@njit
def clear_output(params, row, h, D):
    """Write zeros as head h of one output row."""
    out = parameter(params, Field.OUT) + row * parameter(params, Field.OUT_STRIDE)
    for c in range(0, D, LANES):
        store_as(out, h * D + c, splat(_ZERO), parameter(params, Field.DTYPE))
