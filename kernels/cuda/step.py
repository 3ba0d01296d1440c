"""One token of KDA in Triton, once for the kernels that go token by token: decode and extend (Eq. 1 and 10).

With ``d`` the decay, both products of the decayed state are taken in one pass, and the output follows without a
second one::

    s = S·d    e = s k    o' = s q    u = beta (v - e)    o = o' + u (k·q)    S = s + u k^T

A tile of the state is ``[rows, FOLD, D/FOLD]``: with FOLD > 1 a thread holds FOLD vectors of a row, so that a row sum
is mostly additions within a thread and few shuffles between threads. Decode takes some value channels at a time,
extend the whole head.

The order of operations is part of the code: with at most 128 registers four programs of decode share a multiprocessor,
and in this order nothing is spilled for it (NOTES.md). Windows replay records and finish outputs as these do.
"""
# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false

from __future__ import annotations

import triton
import triton.language as tl

from kimi_vllm.kernels.cuda.math import add3, fused, gated_rms_norm, inverse_norm, log2_decay, sigmoid
from kimi_vllm.kernels.cuda.slots import elements, matrix_rows, record_ptr


@triton.jit
def folded_channels(FOLD: tl.constexpr, D: tl.constexpr):
    """Return the channels of a head as they lie along the rows of a state's tile: ``[1, FOLD, D/FOLD]``."""
    return tl.arange(0, FOLD)[None, :, None] * (D // FOLD) + tl.arange(0, D // FOLD)[None, None, :]


@triton.jit
def state_tile(state_ptr, places, first: tl.constexpr, ROWS: tl.constexpr, FOLD: tl.constexpr, D: tl.constexpr, PIECES: tl.constexpr):  # fmt: skip  # noqa: E501
    """Return where the elements of ROWS rows of a head's matrix lie, from row `first` on: ``[ROWS, FOLD, D/FOLD]``."""
    column = folded_channels(FOLD, D)
    UNIT_ROWS: tl.constexpr = D // PIECES
    if ROWS <= UNIT_ROWS:
        # Rows of one unit: the step from one tile to the next is a constant in the instruction.
        unit_ptr = state_ptr + elements(places[first // UNIT_ROWS], state_ptr)
        return unit_ptr + (tl.arange(0, ROWS)[:, None, None] * D + column) + first % UNIT_ROWS * D
    else:
        rows = matrix_rows(state_ptr, places, first + tl.arange(0, ROWS), D, PIECES)
        return state_ptr + rows[:, None, None] + column


@triton.jit
def fold(x, FOLD: tl.constexpr, D: tl.constexpr):
    """Lay a vector of channels along the rows of a state's tile."""
    return tl.reshape(x, (FOLD, D // FOLD))[None, :, :]  # [1, FOLD, D/FOLD]


@triton.jit
def decay_and_strength(gate_ptrs, beta_ptr, rate, bias):
    """Return the log2 decay of a token's channels and its write strength."""
    g = log2_decay(tl.load(gate_ptrs).to(tl.float32), rate, bias)  # [D]
    return g, sigmoid(tl.load(beta_ptr).to(tl.float32))


@triton.jit
def unit_scales(qq, kk, D: tl.constexpr):
    """Return the factors that make q and k unit vectors, q's times D^-0.5, of their sums of squares."""
    return inverse_norm(qq) * (D**-0.5), inverse_norm(kk)


@triton.jit
def normalise(q, k, D: tl.constexpr):
    """Return q and k as unit vectors, q times D^-0.5, and their product."""
    # Three sums in one reduction: one round of barriers instead of three.
    qq, kk, kq = tl.reduce((q * q, k * k, k * q), 0, add3)
    q_scale, k_scale = unit_scales(qq, kk, D)
    return q * q_scale, k * k_scale, kq * q_scale * k_scale


@triton.jit
def decayed_products(s, d, q, k):
    """Let some rows of a state decay, and multiply them by key and query.

    Args:
        s: the rows, ``[rows, FOLD, D/FOLD]``.
        d, q, k: decay, query and key, ``[1, FOLD, D/FOLD]``.

    Returns:
        The rows, ``e`` and ``o'``.
    """
    s = s * d
    return s, tl.sum(tl.sum(s * k, axis=-2), axis=-1), tl.sum(tl.sum(s * q, axis=-2), axis=-1)  # [rows]


@triton.jit
def delta_rule(s, k, e, v, b):
    """Write into some rows of a state what they lack of a key's values.

    Args:
        s, e: the decayed rows and what they hold for the key, as `decayed_products` returns them.
        k: key, ``[1, FOLD, D/FOLD]``.
        v: values of these rows, ``[rows]``.
        b: write strength.

    Returns:
        The rows, and ``u``, from which the output follows: ``o = o' + u (k·q)``.
    """
    u = b * (v - e)
    return s + tl.expand_dims(u, (-2, -1)) * k, u


@triton.jit
def replay(s, u, k, d):
    """Do to some rows of a state what a token did of which the record is known; arguments in shapes that broadcast.

    In `delta_rule` the decayed rows are used thrice, so that what the compiler fuses with the sum is the product with
    the key. Here it could as well fuse the decay, and round otherwise.
    """
    return fused(u, k, s * d)


@triton.jit
def fold_records(s, memory_ptr, places, count, row, column, D: tl.constexpr, PIECES: tl.constexpr, RECORDS: tl.constexpr, FIRST_RECORD: tl.constexpr):  # fmt: skip  # noqa: E501
    """Advance a state's tile by the tokens of the first `count` records of its slot.

    Args:
        s: the tile, ``[rows, FOLD, D/FOLD]``.
        row, column: which of the head's rows and channels it has, ``[rows]`` and as `folded_channels`.
    """
    for t in range(0, count):
        u_ptr = record_ptr(memory_ptr, places, t, D, PIECES, RECORDS, FIRST_RECORD)
        u = tl.expand_dims(tl.load(u_ptr + row), (-2, -1))
        s = replay(s, u, tl.load(u_ptr + D + column), tl.load(u_ptr + 2 * D + column))
    return s


@triton.jit
def finish(o, z, norm_weight, norm_eps, D: tl.constexpr, DTYPE: tl.constexpr):
    """Round the output of the recurrence, here as in the spec, normalise it and apply the output gate.

    Args:
        o, z: output and gate of one token or several, ``[..., D]``.
        norm_weight: of the same number of dimensions.

    Returns:
        The head's output, and the sum of squares before the norm. That is not finite if the state is not: every row
        of the state is summed with q. A state that outgrows float16 shows only at the next token.
    """
    o = o.to(DTYPE).to(tl.float32)
    square = tl.sum(o * o, axis=-1)
    inverse_rms = tl.rsqrt(square / D + norm_eps)
    if len(o.shape) > 1:
        inverse_rms = tl.expand_dims(inverse_rms, -1)
    return gated_rms_norm(o, inverse_rms, norm_weight, z.to(tl.float32)).to(DTYPE), square
