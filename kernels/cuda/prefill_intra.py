"""Prefill on CUDA, second launch: the products inside a chunk of 64 tokens that do not depend on the state.

One program owns one head of one chunk. From the features (`prefill_features.py`) it makes the decayed scores and the
inverse of Eq. 6, and leaves in their places what the third launch (`prefill.py`) reads::

    w  = M (G*K)    u = M V    qg = G*Q    kg = (G^{i->C} * K)    qk = Tril((G*Q)(K/G)^T)    decay = gamma^C

A chunk is four blocks of 16 tokens. Within a block both sides of a score refer to half of the block's decay. Below
the diagonal the left side is decayed since the start of its block, the right side to the end of its block, and whole
blocks between them are added: no factor exceeds 1. The exact form takes the exponent of every difference within a
block instead.
"""
# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false

from __future__ import annotations

import triton
import triton.language as tl

from kimi_vllm.kernels.cuda.math import exp2, narrow, sigmoid
from kimi_vllm.kernels.cuda.prefill_features import BLOCK, CHUNK, find_chunk


@triton.jit
def _diagonal(a, b, c):
    """Return sum_k a[i]·b[j]·2^(c[i]-c[j]) for j <= i within each block, every exponent taken: [4, 16, 16]."""
    token = tl.arange(0, 16)
    scores = tl.zeros((4, 16, 16), tl.float32)
    for j in range(16):
        at_j = (token == j)[None, :, None]
        b_j = tl.sum(tl.where(at_j, b, 0.0), axis=1)[:, None, :]
        c_j = tl.sum(tl.where(at_j, c, 0.0), axis=1)[:, None, :]
        column = tl.sum(a * b_j * exp2(tl.where((token >= j)[None, :, None], c - c_j, 0.0)), axis=2)
        scores = tl.where((token == j)[None, None, :], column[:, :, None], scores)
    return scores


@triton.jit
def _spread(blocks):
    """Put four blocks [4, 16, 16] on the diagonal of a [64, 64] matrix."""
    b = tl.arange(0, 4)
    same = (b[:, None] == b[None, :])[:, None, :, None]
    return tl.reshape(tl.where(same, blocks[:, :, None, :], 0.0), (CHUNK, CHUNK))


@triton.jit
def _inverse(A, EXACT: tl.constexpr):
    """Return (I + A)^-1 of a strictly lower triangular [64, 64] matrix, by merging inverses of diagonal blocks.

    Of a block of two rows the inverse is I - A. Two neighbours with inverses P and Q, and B below the diagonal between
    them, make ``[[P, 0], [-Q B P, Q]]``: for all neighbours at once, X - X A X, of which only those places are kept.
    Merging keeps its accuracy where keys are alike; powers of A, as in a Neumann series, do not (NOTES.md).

    No element of A or X exceeds 1, so float16 operands have the precision of tf32 and, unlike it, any layout.
    """
    i, j = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    operand: tl.constexpr = tl.float32 if EXACT else tl.float16
    PRECISION: tl.constexpr = "tf32x3" if EXACT else "tf32"
    inverse = tl.where(i == j, 1.0, tl.where(i // 2 == j // 2, -A, 0.0))
    A = A.to(operand)
    for level in tl.static_range(1, 6):
        size = 2**level
        between = (i // (2 * size) == j // (2 * size)) & (i // size > j // size)
        x = inverse.to(operand)
        step = tl.dot(x, A, input_precision=PRECISION).to(operand)
        inverse -= tl.where(between, tl.dot(step, x, input_precision=PRECISION), 0.0)
    return inverse


@triton.jit
def _scaled(tile, factor, D: tl.constexpr):
    """Return a tile times its blocks' factors as an operand, [64, D]."""
    return tl.reshape(narrow(tile.to(tl.float32) * factor, tile.dtype), (CHUNK, D))


@triton.jit(do_not_specialize=["num_sequences"])
def intra_chunk(
    beta_ptr, cu_seqlens_ptr, context_len_ptr,
    q_io_ptr, k_io_ptr, down_io_ptr, v_io_ptr, blocks_in_ptr, qk_out_ptr, decay_out_ptr,
    num_sequences, beta_stride,
    H: tl.constexpr, D: tl.constexpr, EXACT: tl.constexpr, launch_pdl: tl.constexpr,
):  # fmt: skip
    """Turn the features of one head of one chunk into qg, w, kg and u in their places, and qk and decay."""
    program = tl.program_id(0)
    chunk, head = program // H, program % H
    if launch_pdl:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    _, begin, context, position, length = find_chunk(chunk, cu_seqlens_ptr, context_len_ptr, num_sequences)
    if length <= 0:
        return
    row = (begin + position - context).to(tl.int64)
    PRECISION: tl.constexpr = "tf32x3" if EXACT else "tf32"
    operand: tl.constexpr = q_io_ptr.dtype.element_ty
    chunk_head = chunk.to(tl.int64) * H + head
    i, c = tl.arange(0, CHUNK), tl.arange(0, D)
    # Tiles are [block, token in block, channel]: one thread meets one block, so a block's factors cost it little.
    block = tl.arange(0, CHUNK // BLOCK)
    r = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]  # [4, BLOCK], tokens of the chunk
    flat = chunk_head * (CHUNK * D) + i[:, None] * D + c[None, :]  # [CHUNK, D]
    tile = chunk_head * (CHUNK * D) + r[:, :, None] * D + c[None, None, :]  # [4, BLOCK, D], the same elements

    # Decays of the four blocks; below, [4, D]: of each block, and of the blocks before and after it.
    blocks_ptrs = blocks_in_ptr + chunk_head * (CHUNK // BLOCK) * D + c[None, :]
    t0, t1, t2, t3 = (
        tl.load(blocks_ptrs),
        tl.load(blocks_ptrs + D),
        tl.load(blocks_ptrs + 2 * D),
        tl.load(blocks_ptrs + 3 * D),
    )
    tl.store(decay_out_ptr + chunk_head * D + c[None, :], exp2(t0 + t1 + t2 + t3))
    b = block[:, None]
    whole = tl.where(b == 0, t0, tl.where(b == 1, t1, tl.where(b == 2, t2, t3)))
    before = tl.where(b == 0, 0.0, tl.where(b == 1, t0, tl.where(b == 2, t0 + t1, t0 + t1 + t2)))
    after = tl.where(b == 3, 0.0, tl.where(b == 2, t3, tl.where(b == 1, t2 + t3, t1 + t2 + t3)))
    # To and from the middle of the chunk; what a factor does not apply to it sets to zero.
    to_middle = tl.where(b == 0, t1, 0.0)
    from_middle = tl.where(b == 3, t2, 0.0)
    # The features are half a block's decay away from its start and its end.
    rest = tl.zeros((CHUNK // BLOCK, D), tl.float32) if EXACT else 0.5 * whole
    from_start = exp2(rest + before)[:, None, :]
    to_end = exp2(rest + after)[:, None, :]
    from_middle = tl.where(b >= 2, exp2(rest + from_middle), 0.0)[:, None, :]
    to_middle = tl.where(b < 2, exp2(rest + to_middle), 0.0)[:, None, :]
    rest = exp2(rest)[:, None, :]

    block_i, block_j = (i // BLOCK)[:, None], (i // BLOCK)[None, :]
    same = block_i == block_j
    near = (block_i == block_j + 1) & (block_i % 2 == 1)
    # One tile after another, so that few are in registers; q, k and down are written over when all have read them.
    if EXACT:
        q, k, since = tl.load(q_io_ptr + tile), tl.load(k_io_ptr + tile), tl.load(down_io_ptr + tile)
        scores_k, scores_q = _spread(_diagonal(k, k, since)), _spread(_diagonal(q, k, since))
        down, k, q = k * exp2(whole[:, None, :] - since), k * exp2(since), q * exp2(since)
    else:
        right = tl.trans(tl.load(down_io_ptr + flat))
        scores_k = tl.where(same, tl.dot(tl.load(k_io_ptr + flat), right), 0.0)
        down = tl.load(down_io_ptr + tile)
    tl.debug_barrier()
    near_right = tl.trans(_scaled(down, rest, D))
    far_right = tl.trans(_scaled(down, to_middle, D))
    tl.store(down_io_ptr + tile, narrow(down.to(tl.float32) * to_end, operand))
    if not EXACT:
        k = tl.load(k_io_ptr + tile)
    scores_k += tl.where(near, tl.dot(_scaled(k, rest, D), near_right, input_precision=PRECISION), 0.0)
    scores_k = tl.dot(_scaled(k, from_middle, D), far_right, scores_k, input_precision=PRECISION)
    strength = sigmoid(tl.load(beta_ptr + (row + r) * beta_stride + head, mask=r < length, other=0.0).to(tl.float32))
    # Eq. 6 multiplies the columns of M by beta: the values carry it already, the keys get it here.
    keys = _scaled(k, from_start * tl.where(r < length, strength, 0.0)[:, :, None], D)
    if not EXACT:
        scores_q = tl.where(same, tl.dot(tl.load(q_io_ptr + flat), right), 0.0)
        q = tl.load(q_io_ptr + tile)
    scores_q += tl.where(near, tl.dot(_scaled(q, rest, D), near_right, input_precision=PRECISION), 0.0)
    scores_q = tl.dot(_scaled(q, from_middle, D), far_right, scores_q, input_precision=PRECISION)
    tl.store(q_io_ptr + tile, narrow(q.to(tl.float32) * from_start, operand))

    # Eq. 6 and 7: the inverse, and with it w and u.
    scores_q = tl.where(i[:, None] >= i[None, :], scores_q, 0.0)  # [CHUNK, CHUNK]
    tl.store(qk_out_ptr + chunk_head * CHUNK * CHUNK + i[:, None] * CHUNK + i[None, :], narrow(scores_q, operand))
    b_i = sigmoid(tl.load(beta_ptr + (row + i) * beta_stride + head, mask=i < length, other=0.0).to(tl.float32))
    A = tl.where((i[:, None] > i[None, :]) & (i < length)[:, None], scores_k * b_i[:, None], 0.0)  # [CHUNK, CHUNK]
    values = tl.load(v_io_ptr + flat)  # on its way while A is inverted
    M = narrow(_inverse(A, EXACT), operand)
    tl.store(k_io_ptr + flat, narrow(tl.dot(M, keys, input_precision=PRECISION), operand))
    tl.store(v_io_ptr + flat, narrow(tl.dot(M, values, input_precision=PRECISION), operand))
