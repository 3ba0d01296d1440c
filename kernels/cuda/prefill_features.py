"""Prefill on CUDA, first launch: from projections to what the products inside a chunk are made of.

One program owns one head of one block of 16 tokens. It runs the short convolution, SiLU, L2 norm, gate and write
strength, and leaves in the workspace, with ``c`` the log2 decay since the start of the block and ``t`` that of the
whole block::

    q·2^(c-t/2)    k·2^(c-t/2)    k·2^(t/2-c)    beta·v    t

Within a block both sides of a product refer to half of ``t``, so that no factor exceeds 2^116. That needs a bound on
the decay of a token, `MIN_LOG_DECAY`. The exact form leaves q, k, c and beta·v, in float32.
"""
# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false
# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

import triton
import triton.language as tl

from kimi_vllm.kernels.cuda.math import LOG2E, exp2, inverse_norm, log2_decay, narrow, sigmoid, silu
from kimi_vllm.kernels.cuda.slots import column_ptrs, head_places, slot_or_null

CHUNK = tl.constexpr(64)
BLOCK = tl.constexpr(16)
SLACK = tl.constexpr(126)
MIN_LOG_DECAY = tl.constexpr(-10.0)
"""Least natural log decay per token outside the exact form. A state that should keep e^-10 or less of itself
keeps e^-10: 2.7e-6 of the output where 4 % of all gates are that fast."""
EXACT_MIN_LOG_DECAY = tl.constexpr(-25.0)
"""The same in the exact form. It takes differences of decays that are summed over a block, in float32: where tokens
that forget everything (gates of 100 at a rate of 16) come among others, these lost all digits but four."""


@triton.jit
def first_chunk(begin, n):
    """Return the number of the first chunk of a group's n-th sequence, behind `begin` new tokens of the group.

    Chunks lie on the grid of absolute positions, so a sequence of L new tokens spans at most ``(L + 126) // 64``
    of them. Numbering with that bound needs neither a plan made on the host nor a prefix sum: some numbers stay
    unused.
    """
    return (begin + SLACK * n) // CHUNK


@triton.jit
def find_chunk(chunk, cu_seqlens_ptr, context_len_ptr, num_sequences):
    """Return of a chunk: its sequence, that one's first row and context, the chunk's position and its length.

    The sequence is the last one whose chunks begin at or before this number. An unused number has no length.
    """
    count, start = 0, tl.load(cu_seqlens_ptr)  # the first of the group
    for first in range(0, num_sequences, 256):
        n = first + tl.arange(0, 256)
        begin = tl.load(cu_seqlens_ptr + n, mask=n < num_sequences, other=0)
        count += tl.sum(((n < num_sequences) & (first_chunk(begin - start, n) <= chunk)).to(tl.int32), axis=0)
    n = count - 1
    begin, context = tl.load(cu_seqlens_ptr + n), tl.load(context_len_ptr + n)
    end = context + tl.load(cu_seqlens_ptr + n + 1) - begin
    grid = context // CHUNK + chunk - first_chunk(begin - start, n)
    position = tl.maximum(context, grid * CHUNK)
    return n, begin, context, position, tl.minimum((grid + 1) * CHUNK, end) - position


@triton.jit
def _load_rows(qkv_ptr, stride, row, i, offset, length, channel, W: tl.constexpr):
    """Load the rows from W-1 before to three after `i`, zeros outside the chunk's sequence; W + 3 tiles.

    A thread has four consecutive rows, so that W + 3 loads serve 4·W products.
    """
    rows = ()
    for m in tl.static_range(W + 3):
        back = i + (m - (W - 1))
        mask = (back < length) & (offset + back >= 0)
        x = tl.load(qkv_ptr + (row + back)[:, None] * stride + channel, mask=mask[:, None], other=0.0)
        rows = rows + (x,)
    return rows


@triton.jit
def _load_history(ring_ptr, places, i, offset, position, channel, D: tl.constexpr, W: tl.constexpr, R: tl.constexpr, PIECES: tl.constexpr, RING: tl.constexpr):  # fmt: skip  # noqa: E501
    """Load from the ring what the sequence's first rows need of those before them; W - 1 tiles."""
    rows = ()
    for m in tl.static_range(W - 1):
        back = i + (m - (W - 1))
        mask = (offset + back < 0) & (position + back >= 0)
        old_ptrs = column_ptrs(ring_ptr, places, position + back, D, R, PIECES, RING)[:, None] + channel
        rows = rows + (tl.load(old_ptrs, mask=mask[:, None], other=0.0).to(tl.float32),)
    return rows


@triton.jit
def _convolve(rows, history, conv_weight_ptr, channel, WIDTH: tl.constexpr, W: tl.constexpr):
    """Run the short convolution and SiLU, rounded as the projections are.

    Rows past the end of the chunk hold something finite if the sequence does: their write strength is zero.

    Returns:
        Four tiles, the j-th with row j of every group.
    """
    inputs = ()
    for m in tl.static_range(W + 3):
        x = rows[m].to(tl.float32)
        if m < W - 1:
            x += history[m]
        inputs = inputs + (x,)
    weights = ()
    for tap in tl.static_range(W):
        weights = weights + (tl.load(conv_weight_ptr + tap * WIDTH + channel),)
    outputs = ()
    for j in tl.static_range(4):
        total = inputs[j] * weights[0]
        for tap in tl.static_range(1, W):
            total += inputs[j + tap] * weights[tap]
        outputs = outputs + (narrow(silu(total), rows[0].dtype).to(tl.float32),)
    return outputs


@triton.jit(
    do_not_specialize=["num_sequences", "table_stride", "table_width", "first_unit"],
    do_not_specialize_on_alignment=["slot_table_ptr"],
)
def chunk_features(
    qkv_ptr, gate_ptr, beta_ptr, conv_weight_ptr, A_log_ptr, dt_bias_ptr, ring_ptr, pages_ptr,
    cu_seqlens_ptr, context_len_ptr, slot_table_ptr, block_size,
    q_out_ptr, k_out_ptr, down_out_ptr, v_out_ptr, decay_out_ptr,
    num_sequences, num_slots, pages_stride, first_unit, table_stride, table_width,
    qkv_stride, gate_stride, beta_stride,
    H: tl.constexpr, D: tl.constexpr, W: tl.constexpr, R: tl.constexpr,
    BLOCK_STEPS: tl.constexpr, UNIT_STEPS: tl.constexpr, UNITS: tl.constexpr, PIECES: tl.constexpr, RING: tl.constexpr,
    EXACT: tl.constexpr, launch_pdl: tl.constexpr,
):  # fmt: skip
    """Fill the workspace of one head of one block; leaves at once if its chunk's number is not used."""
    program = tl.program_id(0)
    head, block, chunk = program % H, (program // H) % (CHUNK // BLOCK), program // (H * (CHUNK // BLOCK))
    if launch_pdl:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    n, begin, context, position, length = find_chunk(chunk, cu_seqlens_ptr, context_len_ptr, num_sequences)
    if length <= 0:
        return
    offset = position - context
    row = (begin + offset).to(tl.int64)
    read = tl.full((), 0, tl.int32)
    if context > 0:
        table_ptr = slot_table_ptr + n.to(tl.int64) * table_stride
        read = slot_or_null(table_ptr, (context - 1) // block_size, table_width, num_slots)
    has_history = (offset < W - 1) & (read > 0) & (block == 0)
    operand: tl.constexpr = q_out_ptr.dtype.element_ty
    # A block is four groups of four tokens. A tile holds one token of each group, so that a thread has the tokens of a
    # group one after another and loads each row of the convolution's window once.
    group = tl.arange(0, BLOCK // 4)
    # Weights are loaded once per group: in a tile of another shape, the layout of all arithmetic would follow theirs.
    c = tl.broadcast_to(tl.arange(0, D)[None, :], (BLOCK // 4, D))
    i = block * BLOCK + group * 4
    chunk_head = chunk.to(tl.int64) * H + head
    tile = chunk_head * (CHUNK * D) + i[:, None] * D + c  # [BLOCK/4, D], of the first rows of the groups

    # Everything is asked for before anything is used; k first, because it is used first.
    none = tl.zeros((BLOCK // 4, D), tl.float32)
    histories = ((none,) * (W - 1), (none,) * (W - 1), (none,) * (W - 1))
    if has_history:
        unit = first_unit + head * PIECES
        places = head_places(pages_ptr, read, pages_stride, unit, BLOCK_STEPS, UNIT_STEPS, UNITS, PIECES)
        found = ()
        for part in tl.static_range(3):  # q, k, v
            found = found + (_load_history(ring_ptr, places, i, offset, position, part * D + c, D, W, R, PIECES, RING),)
        histories = found
    gates, strengths = (), ()
    for j in tl.static_range(4):
        there = i + j < length
        x = tl.load(gate_ptr + (row + i + j)[:, None] * gate_stride + head * D + c, mask=there[:, None], other=0.0)
        gates = gates + (x,)
        x = tl.load(beta_ptr + (row + i + j) * beta_stride + head, mask=there, other=0.0)
        strengths = strengths + (x,)
    rows_k = _load_rows(qkv_ptr, qkv_stride, row, i, offset, length, (H + head) * D + c, W)
    rows_q = _load_rows(qkv_ptr, qkv_stride, row, i, offset, length, head * D + c, W)
    rows_v = _load_rows(qkv_ptr, qkv_stride, row, i, offset, length, (2 * H + head) * D + c, W)

    rate, bias = exp2(tl.load(A_log_ptr + head) * LOG2E), tl.load(dt_bias_ptr + head * D + c)
    since = ()
    for j in tl.static_range(4):
        g = log2_decay(gates[j].to(tl.float32), rate, bias)  # [BLOCK/4, D]
        least = EXACT_MIN_LOG_DECAY if EXACT else MIN_LOG_DECAY
        g = tl.maximum(g, least * LOG2E, propagate_nan=tl.PropagateNan.ALL)
        g = tl.where((i + j < length)[:, None], g, 0.0)
        if j > 0:
            g += since[j - 1]
        since = since + (g,)
    # So far since the start of the group of four; the groups before it are added.
    whole = tl.sum(since[3], axis=0)  # [D]
    earlier = tl.cumsum(since[3], axis=0) - since[3]  # [BLOCK/4, D]
    tl.store(decay_out_ptr + (chunk_head * (CHUNK // BLOCK) + block) * D + tl.arange(0, D), whole)
    half = 0.5 * whole[None, :]

    k = _convolve(rows_k, histories[1], conv_weight_ptr, (H + head) * D + c, 3 * H * D, W)
    for j in tl.static_range(4):
        x = k[j] * inverse_norm(tl.sum(k[j] * k[j], axis=1))[:, None]
        if EXACT:
            tl.store(k_out_ptr + tile + j * D, x)
            tl.store(down_out_ptr + tile + j * D, since[j] + earlier)
        else:
            shifted = since[j] + earlier - half
            tl.store(k_out_ptr + tile + j * D, narrow(x * exp2(shifted), operand))
            tl.store(down_out_ptr + tile + j * D, narrow(x * exp2(-shifted), operand))
    q = _convolve(rows_q, histories[0], conv_weight_ptr, head * D + c, 3 * H * D, W)
    for j in tl.static_range(4):
        x = q[j] * (inverse_norm(tl.sum(q[j] * q[j], axis=1)) * (D**-0.5))[:, None]
        if not EXACT:
            x = x * exp2(since[j] + earlier - half)
        tl.store(q_out_ptr + tile + j * D, narrow(x, operand))
    v = _convolve(rows_v, histories[2], conv_weight_ptr, (2 * H + head) * D + c, 3 * H * D, W)
    for j in tl.static_range(4):
        b = tl.where(i + j < length, sigmoid(strengths[j].to(tl.float32)), 0.0)
        tl.store(v_out_ptr + tile + j * D, narrow(v[j] * b[:, None], operand))
