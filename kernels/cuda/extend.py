"""Short prefills on CUDA: a few tokens more of some sequences in one launch, token by token.

One program owns one head of one sequence and keeps its state in registers; what it does per token stands in
`step.py`. In chunks of 64 tokens, three or four launches take longer than this for up to
`launch.EXTEND_TOKENS` tokens (NOTES.md).
"""
# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false
# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kimi_vllm.kernels.contract import Activations, Pools, PrefillRows, Weights
from kimi_vllm.kernels.cuda import launch
from kimi_vllm.kernels.cuda.math import LOG2E, everywhere, exp2, largest, silu
from kimi_vllm.kernels.cuda.slots import column_ptrs, export_history, head_places, records_to_fold, slot_or_null
from kimi_vllm.kernels.cuda.step import (
    decay_and_strength,
    decayed_products,
    delta_rule,
    finish,
    fold,
    fold_records,
    folded_channels,
    normalise,
    state_tile,
)


@triton.jit
def _feature(qkv_ptr, ring_ptr, places, conv_weight_ptr, row, stride, position, context, read, vector, channel, WIDTH: tl.constexpr, D: tl.constexpr, W: tl.constexpr, R: tl.constexpr, PIECES: tl.constexpr, RING: tl.constexpr):  # fmt: skip  # noqa: E501
    """Run the convolution and SiLU for the token at `position`, whose row is `row`; rounded as the projections are.

    Of the W tokens, those of this step come from the projections and earlier ones from the ring.
    """
    total = tl.zeros(channel.shape, tl.float32)  # [D]
    for tap in tl.static_range(W):
        past = position - (W - 1) + tap
        new = everywhere(past >= context, channel.shape)
        x = tl.load(qkv_ptr + (row - (W - 1) + tap) * stride + channel, mask=new, other=0.0).to(tl.float32)
        if tap < W - 1:
            old = everywhere((past < context) & (past >= 0) & (read > 0), channel.shape)
            old_ptrs = column_ptrs(ring_ptr, places, past, D, R, PIECES, RING) + vector
            x += tl.load(old_ptrs, mask=old, other=0.0).to(tl.float32)
        total += x * tl.load(conv_weight_ptr + tap * WIDTH + channel)
    return silu(total).to(qkv_ptr.dtype.element_ty).to(tl.float32)


@triton.jit(
    do_not_specialize=["num_sequences", "num_tokens", "table_stride", "table_width", "first_unit"],
    do_not_specialize_on_alignment=["slot_table_ptr"],
)
def extend(
    qkv_ptr, gate_ptr, beta_ptr, out_gate_ptr, out_ptr,
    conv_weight_ptr, A_log_ptr, dt_bias_ptr, norm_weight_ptr, norm_eps,
    ring_ptr, state_ptr, memory_ptr, pages_ptr,
    cu_seqlens_ptr, context_len_ptr, slot_table_ptr, block_size, num_fold_ptr, nonfinite_ptr,
    num_sequences, num_tokens, num_slots, pages_stride, first_unit, table_stride, table_width,
    qkv_stride, gate_stride, beta_stride, out_gate_stride, out_stride,
    H: tl.constexpr, D: tl.constexpr, W: tl.constexpr, R: tl.constexpr,
    BLOCK_STEPS: tl.constexpr, UNIT_STEPS: tl.constexpr, UNITS: tl.constexpr, PIECES: tl.constexpr, RING: tl.constexpr,
    WINDOW: tl.constexpr, RECORDS: tl.constexpr, FIRST_RECORD: tl.constexpr, FLAGS: tl.constexpr,
    FOLD: tl.constexpr, launch_pdl: tl.constexpr,
):  # fmt: skip
    """Run one head of one sequence over its new tokens; the last programs clear rows that belong to nobody."""
    program = tl.program_id(0)
    n, head = program // H, program % H
    c = tl.arange(0, D)
    if launch_pdl:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    begin = tl.load(cu_seqlens_ptr + n)
    if n == num_sequences:
        for i in range(0, num_tokens - begin):
            row = (begin + i).to(tl.int64)
            tl.store(out_ptr + row * out_stride + head * D + c, tl.zeros((D,), out_ptr.dtype.element_ty))
        return
    context, length = tl.load(context_len_ptr + n), tl.load(cu_seqlens_ptr + n + 1) - begin
    end = context + length
    table_ptr = slot_table_ptr + n.to(tl.int64) * table_stride
    read = tl.full((), 0, tl.int32)
    if context > 0:
        read = slot_or_null(table_ptr, (context - 1) // block_size, table_width, num_slots)
    unit = first_unit + head * PIECES
    places = head_places(pages_ptr, read, pages_stride, unit, BLOCK_STEPS, UNIT_STEPS, UNITS, PIECES)
    source_ptrs = state_tile(state_ptr, places, 0, D, FOLD, D, PIECES)
    state = tl.load(source_ptrs, mask=everywhere(read > 0, (D, FOLD, D // FOLD)), other=0.0)
    state = state.to(tl.float32)  # [D, FOLD, D/FOLD]
    if num_fold_ptr is not None:
        count = records_to_fold(num_fold_ptr, n, read, WINDOW)
        column = folded_channels(FOLD, D)
        state = fold_records(state, memory_ptr, places, count, c, column, D, PIECES, RECORDS, FIRST_RECORD)
    rate = exp2(tl.load(A_log_ptr + head) * LOG2E)
    bias, weight = tl.load(dt_bias_ptr + head * D + c), tl.load(norm_weight_ptr + c)
    WIDTH: tl.constexpr = 3 * H * D
    act = qkv_ptr.dtype.element_ty
    finite = tl.full((), 1, tl.int32)
    for position in range(context, end):
        row = (begin + position - context).to(tl.int64)
        mixed = ()
        for part in tl.static_range(3):  # q, k, v
            channel = (part * H + head) * D + c
            x = _feature(qkv_ptr, ring_ptr, places, conv_weight_ptr, row, qkv_stride, position, context, read, part * D + c, channel, WIDTH, D, W, R, PIECES, RING)  # fmt: skip  # noqa: E501
            mixed = mixed + (x,)
        gate_ptrs, strength_ptr = gate_ptr + row * gate_stride + head * D + c, beta_ptr + row * beta_stride + head
        g, b = decay_and_strength(gate_ptrs, strength_ptr, rate, bias)
        q, k, kq = normalise(mixed[0], mixed[1], D)
        d_tile, q_tile, k_tile = fold(exp2(g), FOLD, D), fold(q, FOLD, D), fold(k, FOLD, D)
        state, e, o = decayed_products(state, d_tile, q_tile, k_tile)
        state, u = delta_rule(state, k_tile, e, mixed[2], b)
        z = tl.load(out_gate_ptr + row * out_gate_stride + head * D + c)
        y, square = finish(o + u * kq, z, weight, norm_eps, D, act)
        finite = tl.where(square < float("inf"), finite, 0)
        tl.store(out_ptr + row * out_stride + head * D + c, y)
        stop = position + 1
        if (stop == end) | (stop % block_size == 0):
            slot = slot_or_null(table_ptr, position // block_size, table_width, num_slots)
            if slot > 0:
                stored = state.to(state_ptr.dtype.element_ty)
                targets = head_places(pages_ptr, slot, pages_stride, unit, BLOCK_STEPS, UNIT_STEPS, UNITS, PIECES)
                tl.store(state_tile(state_ptr, targets, 0, D, FOLD, D, PIECES), stored)
                export_history(
                    slot, read, stop, context, row + 1, head, c, qkv_ptr, qkv_stride, ring_ptr,
                    pages_ptr, pages_stride, unit, H, D, W, R, BLOCK_STEPS, UNIT_STEPS, UNITS, PIECES, RING,
                )  # fmt: skip
                if nonfinite_ptr is not None:
                    sick = finite == 0
                    if state_ptr.dtype.element_ty == tl.float16:
                        sick = sick | (tl.max(largest(stored.to(tl.float32)), axis=0) == float("inf"))
                    tl.store(nonfinite_ptr + slot * FLAGS, 1, mask=sick)


def extend_sequences(x: Activations, weights: Weights, pools: Pools, rows: PrefillRows, out: Tensor) -> None:
    """Run every sequence over its few new tokens; see `contract.KdaPrefill`."""
    T, N = x.qkv.shape[0], rows.context_len.shape[0]
    cut, table = pools.cut, rows.slot_table
    memory = None if rows.num_fold is None else launch.records(pools)
    extend[((N + 1) * cut.H,)](
        x.qkv, x.gate, x.beta, x.out_gate, out,
        weights.conv_weight, weights.A_log, weights.dt_bias, weights.norm_weight, weights.norm_eps,
        *launch.typed(pools), memory, pools.pages,
        rows.cu_seqlens, rows.context_len, table, rows.block_size, rows.num_fold, pools.nonfinite,
        N, T, *pools.pages.shape, pools.first_unit, table.stride(0), table.shape[1],
        x.qkv.stride(0), x.gate.stride(0), x.beta.stride(0), x.out_gate.stride(0), out.stride(0),
        W=weights.conv_weight.shape[0], **launch.sizes(cut),
        **launch.window_sizes(cut), FLAGS=cut.flags, FOLD=2,
        num_warps=4, num_stages=1, **launch.pdl(x.qkv.device),
    )  # fmt: skip
