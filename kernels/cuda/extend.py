"""Short prefills on CUDA: a few tokens more of some sequences in one launch, token by token.

One program owns one head of one sequence and keeps its state in registers; what it does per token is what
`decode.py` does. In chunks of 64 tokens, three or four launches take longer than this for up to
`launch.EXTEND_TOKENS` tokens (NOTES.md).
"""
# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kimi_vllm.kernels.contract import Activations, Pools, PrefillRows, Weights
from kimi_vllm.kernels.cuda import launch
from kimi_vllm.kernels.cuda.math import (
    LOG2E,
    add3,
    everywhere,
    exp2,
    gated_rms_norm,
    inverse_norm,
    largest,
    log2_decay,
    sigmoid,
    silu,
)
from kimi_vllm.kernels.cuda.slots import export_history, slot_or_null


@triton.jit
def _feature(qkv, ring, conv_weight, row, stride, column_stride, position, context, read, channel, WIDTH: tl.constexpr, W: tl.constexpr, R: tl.constexpr):  # fmt: skip  # noqa: E501
    """Run the convolution and SiLU for the token at `position`, whose row is `row`; rounded as the projections are."""
    total = tl.zeros(channel.shape, tl.float32)
    for tap in tl.static_range(W):
        past = position - (W - 1) + tap
        new = everywhere(past >= context, channel.shape)
        x = tl.load(qkv + (row - (W - 1) + tap) * stride + channel, mask=new, other=0.0).to(tl.float32)
        if tap < W - 1:
            old = everywhere((past < context) & (past >= 0) & (read > 0), channel.shape)
            x += tl.load(ring + (past % R) * column_stride + channel, mask=old, other=0.0).to(tl.float32)
        total += x * tl.load(conv_weight + tap * WIDTH + channel)
    return silu(total).to(qkv.dtype.element_ty).to(tl.float32)


@triton.jit(
    do_not_specialize=["num_sequences", "num_tokens", "table_stride", "table_width"],
    do_not_specialize_on_alignment=["slot_table"],
)
def extend(
    qkv, gate, beta, out_gate, out, conv_weight, A_log, dt_bias, norm_weight, norm_eps, conv_pool, state_pool,
    cu_seqlens, context_len, slot_table, block_size, nonfinite,
    num_sequences, num_tokens, num_slots, table_stride, table_width,
    qkv_stride, gate_stride, beta_stride, out_gate_stride, out_stride,
    conv_slot_stride, conv_column_stride, state_slot_stride, state_head_stride,
    H: tl.constexpr, D: tl.constexpr, W: tl.constexpr, R: tl.constexpr, FOLD: tl.constexpr, launch_pdl: tl.constexpr,
):  # fmt: skip
    """Run one head of one sequence over its new tokens; the last programs clear rows that belong to nobody."""
    program = tl.program_id(0)
    n, head = program // H, program % H
    c = tl.arange(0, D)
    if launch_pdl:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    begin = tl.load(cu_seqlens + n)
    if n == num_sequences:
        for i in range(0, num_tokens - begin):
            row = (begin + i).to(tl.int64)
            tl.store(out + row * out_stride + head * D + c, tl.zeros((D,), out.dtype.element_ty))
        return
    context, length = tl.load(context_len + n), tl.load(cu_seqlens + n + 1) - begin
    end = context + length
    table = slot_table + n.to(tl.int64) * table_stride
    read = tl.full((), 0, tl.int32)
    if context > 0:
        read = slot_or_null(table, (context - 1) // block_size, table_width, num_slots)
    ring = conv_pool + read.to(tl.int64) * conv_slot_stride
    tile = head * state_head_stride + tl.arange(0, D)[:, None, None] * D
    tile += tl.arange(0, FOLD)[None, :, None] * (D // FOLD) + tl.arange(0, D // FOLD)[None, None, :]
    source = state_pool + read.to(tl.int64) * state_slot_stride + tile
    state = tl.load(source, mask=everywhere(read > 0, (D, FOLD, D // FOLD)), other=0.0).to(tl.float32)
    rate = exp2(tl.load(A_log + head) * LOG2E)
    bias, weight = tl.load(dt_bias + head * D + c), tl.load(norm_weight + c)
    WIDTH: tl.constexpr = 3 * H * D
    act = qkv.dtype.element_ty
    finite = tl.full((), 1, tl.int32)
    for position in range(context, end):
        row = (begin + position - context).to(tl.int64)
        q = _feature(qkv, ring, conv_weight, row, qkv_stride, conv_column_stride, position, context, read, head * D + c, WIDTH, W, R)  # fmt: skip  # noqa: E501
        k = _feature(qkv, ring, conv_weight, row, qkv_stride, conv_column_stride, position, context, read, (H + head) * D + c, WIDTH, W, R)  # fmt: skip  # noqa: E501
        v = _feature(qkv, ring, conv_weight, row, qkv_stride, conv_column_stride, position, context, read, (2 * H + head) * D + c, WIDTH, W, R)  # fmt: skip  # noqa: E501
        g = log2_decay(tl.load(gate + row * gate_stride + head * D + c).to(tl.float32), rate, bias)
        b = sigmoid(tl.load(beta + row * beta_stride + head).to(tl.float32))
        qq, kk, kq = tl.reduce((q * q, k * k, k * q), 0, add3)
        q_scale, k_scale = inverse_norm(qq) * (D**-0.5), inverse_norm(kk)
        q_tile = tl.reshape(q * q_scale, (FOLD, D // FOLD))[None, :, :]
        k_tile = tl.reshape(k * k_scale, (FOLD, D // FOLD))[None, :, :]
        state = state * tl.reshape(exp2(g), (FOLD, D // FOLD))[None, :, :]
        u = b * (v - tl.sum(tl.sum(state * k_tile, axis=1), axis=1))
        o = tl.sum(tl.sum(state * q_tile, axis=1), axis=1) + u * (kq * q_scale * k_scale)
        state += u[:, None, None] * k_tile
        o = o.to(act).to(tl.float32)
        square = tl.sum(o * o, axis=0)
        finite = tl.where(square < float("inf"), finite, 0)
        z = tl.load(out_gate + row * out_gate_stride + head * D + c).to(tl.float32)
        y = gated_rms_norm(o, tl.rsqrt(square / D + norm_eps), weight, z)
        tl.store(out + row * out_stride + head * D + c, y.to(act))
        stop = position + 1
        if (stop == end) | (stop % block_size == 0):
            slot = slot_or_null(table, position // block_size, table_width, num_slots)
            if slot > 0:
                target = state_pool + slot.to(tl.int64) * state_slot_stride + tile
                stored = state.to(state_pool.dtype.element_ty)
                tl.store(target, stored)
                export_history(
                    slot, read, stop, context, row + 1, head, c,
                    qkv, conv_pool, qkv_stride, conv_slot_stride, conv_column_stride, H, D, W, R,
                )  # fmt: skip
                if nonfinite is not None:
                    # A state that is not finite shows in the output: every row of it is summed with q. One that
                    # outgrows float16 does not.
                    sick = finite == 0
                    if state_pool.dtype.element_ty == tl.float16:
                        sick = sick | (tl.max(largest(stored.to(tl.float32)), axis=0) == float("inf"))
                    tl.store(nonfinite + slot, 1, mask=sick)


def extend_sequences(x: Activations, weights: Weights, pools: Pools, rows: PrefillRows, out: Tensor) -> None:
    """Run every sequence over its few new tokens; see `contract.KdaPrefill`."""
    T, N = x.qkv.shape[0], rows.context_len.shape[0]
    S, H, _, D = pools.state.shape
    table = rows.slot_table
    extend[((N + 1) * H,)](
        x.qkv, x.gate, x.beta, x.out_gate, out,
        weights.conv_weight, weights.A_log, weights.dt_bias, weights.norm_weight, weights.norm_eps,
        pools.conv, pools.state, rows.cu_seqlens, rows.context_len, table, rows.block_size, pools.nonfinite,
        N, T, S, table.stride(0), table.shape[1],
        x.qkv.stride(0), x.gate.stride(0), x.beta.stride(0), x.out_gate.stride(0), out.stride(0),
        *pools.conv.stride()[:2], *pools.state.stride()[:2],
        H=H, D=D, W=weights.conv_weight.shape[0], R=pools.conv.shape[1], FOLD=2,
        num_warps=4, num_stages=1, **launch.pdl(x.qkv.device),
    )  # fmt: skip
