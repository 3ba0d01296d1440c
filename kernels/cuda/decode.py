"""Decode on CUDA: one token of every row in one launch per layer.

One program owns one head of one row. It runs the short convolution from the ring, SiLU, L2 norm, gate, write
strength, the state update and the gated norm. With ``d`` the decay, both products of the decayed state are taken in
one pass, and the output follows without a second one::

    s = S·d    e = s k    o' = s q    u = beta (v - e)    o = o' + u (k·q)    S = s + u k^T

What bounds it is the state: read once, written once, 128 KiB per head with D=128 in float32. A program's arithmetic
and its order do not depend on what else is in the batch, so neither does a row's result, bit by bit; the launch table
keeps it so across batch sizes by changing only how many rows of the state are in flight (NOTES.md).

Programmatic dependent launch: slots, positions, weights, pools and the first state tile are read before the kernel
ahead has ended. They must not be what that one kernel writes; activations may.
"""
# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kimi_vllm.kernels.contract import Activations, DecodeRows, Pools, Weights
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


@triton.jit
def _ring(conv_pool, conv_weight, slot, position, channel, column_stride, WIDTH: tl.constexpr, W: tl.constexpr, R: tl.constexpr):  # fmt: skip  # noqa: E501
    """Convolve the W-1 projections before `position`; zeros where there is no token."""
    total = tl.zeros(channel.shape, tl.float32)
    for tap in tl.static_range(W - 1):
        past = position - (W - 1) + tap
        x = tl.load(
            conv_pool + (past % R) * column_stride + channel,
            mask=everywhere((past >= 0) & (slot > 0), channel.shape),
            other=0.0,
        )
        total += x.to(tl.float32) * tl.load(conv_weight + tap * WIDTH + channel)
    return total


@triton.jit
def _keep(conv_pool, source, target, x, read, write, position, channel, column_stride, W: tl.constexpr, R: tl.constexpr):  # fmt: skip  # noqa: E501
    """Write the current projection into its column; in another slot than the one read, complete the history."""
    tl.store(target + (position % R) * column_stride + channel, x.to(conv_pool.dtype.element_ty))
    if read != write:
        for tap in tl.static_range(1, W - 1):
            past = position - (W - 1) + tap
            old = tl.load(
                source + (past % R) * column_stride + channel,
                mask=everywhere((past >= 0) & (read > 0), channel.shape),
                other=0.0,
            )
            tl.store(target + (past % R) * column_stride + channel, old, mask=everywhere(past >= 0, channel.shape))


@triton.jit(do_not_specialize_on_alignment=["qkv", "gate", "beta", "out_gate", "out", "read_slot", "write_slot", "position"])  # fmt: skip  # noqa: E501
def _decode(
    qkv, gate, beta, out_gate, out,
    conv_weight, A_log, dt_bias, norm_weight, norm_eps,
    conv_pool, state_pool, read_slot, write_slot, position, nonfinite,
    num_slots, qkv_stride, gate_stride, beta_stride, out_gate_stride, out_stride,
    conv_slot_stride, conv_column_stride, state_slot_stride, state_head_stride,
    H: tl.constexpr, D: tl.constexpr, W: tl.constexpr, R: tl.constexpr,
    ROWS: tl.constexpr, FOLD: tl.constexpr, launch_pdl: tl.constexpr,
):  # fmt: skip
    """Advance one head of one row; ROWS value channels of the state at a time.

    A tile of the state is [ROWS, FOLD, D/FOLD]: with FOLD > 1 a thread holds FOLD vectors of a row, so that a
    row sum is mostly additions within a thread and few shuffles between threads.
    """
    program = tl.program_id(0)
    n, head = program // H, program % H
    read = tl.load(read_slot + n)
    write = tl.load(write_slot + n)
    p = tl.load(position + n)
    c = tl.arange(0, D)
    out_ptr = out + n.to(tl.int64) * out_stride + head * D + c
    live = (write > 0) & (write < num_slots) & (read >= 0) & (read < num_slots)
    if live:
        # Before the wait: what an earlier kernel than the last one wrote, or nobody.
        own = everywhere(read > 0, (ROWS, FOLD, D // FOLD))
        tile = tl.arange(0, ROWS)[:, None, None] * D
        tile += tl.arange(0, FOLD)[None, :, None] * (D // FOLD) + tl.arange(0, D // FOLD)[None, None, :]
        source = state_pool + read.to(tl.int64) * state_slot_stride + head * state_head_stride + tile
        target = state_pool + write.to(tl.int64) * state_slot_stride + head * state_head_stride + tile
        loaded = tl.load(source, mask=own, other=0.0, eviction_policy="evict_first")
        ring_read = conv_pool + read.to(tl.int64) * conv_slot_stride
        ring_write = conv_pool + write.to(tl.int64) * conv_slot_stride
        q_channel = head * D + c
        k_channel = (H + head) * D + c
        v_channel = (2 * H + head) * D + c
        q_past = _ring(ring_read, conv_weight, read, p, q_channel, conv_column_stride, 3 * H * D, W, R)
        k_past = _ring(ring_read, conv_weight, read, p, k_channel, conv_column_stride, 3 * H * D, W, R)
        v_past = _ring(ring_read, conv_weight, read, p, v_channel, conv_column_stride, 3 * H * D, W, R)
        last_tap = conv_weight + (W - 1) * 3 * H * D
        q_tap, k_tap, v_tap = (
            tl.load(last_tap + q_channel),
            tl.load(last_tap + k_channel),
            tl.load(last_tap + v_channel),
        )
        rate = exp2(tl.load(A_log + head) * LOG2E)
        bias = tl.load(dt_bias + head * D + c)
        if launch_pdl:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()

        row = n.to(tl.int64)
        qkv_row = qkv + row * qkv_stride
        q_x = tl.load(qkv_row + q_channel).to(tl.float32)
        k_x = tl.load(qkv_row + k_channel).to(tl.float32)
        v_x = tl.load(qkv_row + v_channel).to(tl.float32)
        g = log2_decay(tl.load(gate + row * gate_stride + head * D + c).to(tl.float32), rate, bias)
        b = sigmoid(tl.load(beta + row * beta_stride + head).to(tl.float32))
        act = qkv.dtype.element_ty
        q = silu(q_past + q_x * q_tap).to(act).to(tl.float32)
        k = silu(k_past + k_x * k_tap).to(act).to(tl.float32)
        v = silu(v_past + v_x * v_tap).to(act).to(tl.float32)
        # Three sums in one reduction: one round of barriers instead of three.
        qq, kk, kq = tl.reduce((q * q, k * k, k * q), 0, add3)
        q_scale, k_scale = inverse_norm(qq) * (D**-0.5), inverse_norm(kk)
        q, k, kq = q * q_scale, k * k_scale, kq * q_scale * k_scale
        d_tile = tl.reshape(exp2(g), (FOLD, D // FOLD))[None, :, :]
        q_tile = tl.reshape(q, (FOLD, D // FOLD))[None, :, :]
        k_tile = tl.reshape(k, (FOLD, D // FOLD))[None, :, :]
        _keep(conv_pool, ring_read, ring_write, q_x, read, write, p, q_channel, conv_column_stride, W, R)
        _keep(conv_pool, ring_read, ring_write, k_x, read, write, p, k_channel, conv_column_stride, W, R)
        _keep(conv_pool, ring_read, ring_write, v_x, read, write, p, v_channel, conv_column_stride, W, R)

        STEPS: tl.constexpr = D // ROWS
        v_rows = tl.reshape(v, (STEPS, ROWS))
        step_index = tl.arange(0, STEPS)[:, None]
        o = tl.zeros((STEPS, ROWS), tl.float32)
        size = tl.zeros((ROWS,), tl.float32)
        WATCHED: tl.constexpr = nonfinite is not None and state_pool.dtype.element_ty == tl.float16
        for step in tl.static_range(STEPS):
            s = loaded.to(tl.float32)
            if step + 1 < STEPS:
                loaded = tl.load(source + (step + 1) * ROWS * D, mask=own, other=0.0, eviction_policy="evict_first")
            s = s * d_tile
            e = tl.sum(tl.sum(s * k_tile, axis=1), axis=1)
            o_s = tl.sum(tl.sum(s * q_tile, axis=1), axis=1)
            v_s = tl.sum(tl.where(step_index == step, v_rows, 0.0), axis=0)
            u = b * (v_s - e)
            s += u[:, None, None] * k_tile
            stored = s.to(state_pool.dtype.element_ty)
            tl.store(target + step * ROWS * D, stored, eviction_policy="evict_first")
            if WATCHED:
                size = tl.maximum(size, largest(stored.to(tl.float32)))
            o = tl.where(step_index == step, (o_s + u * kq)[None, :], o)

        # The recurrence's output is rounded before its norm, here as in the spec.
        o = tl.reshape(o, (D,)).to(act).to(tl.float32)
        square = tl.sum(o * o, axis=0)
        z = tl.load(out_gate + row * out_gate_stride + head * D + c).to(tl.float32)
        y = gated_rms_norm(o, tl.rsqrt(square / D + norm_eps), tl.load(norm_weight + c), z)
        tl.store(out_ptr, y.to(act))
        if nonfinite is not None:
            # A state that is not finite shows in the output: every row of it is summed with q. One that outgrows
            # float16 does so only at the next step.
            sick = (square < float("inf")) == 0
            if WATCHED:
                sick = sick | (tl.max(size, axis=0) == float("inf"))
            tl.store(nonfinite + write, 1, mask=sick)
    else:
        if launch_pdl:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        tl.store(out_ptr, tl.zeros((D,), tl.float32).to(out.dtype.element_ty))


def kda_decode(
    x: Activations,
    weights: Weights,
    pools: Pools,
    rows: DecodeRows,
    out: Tensor,
    config: launch.Decode | None = None,
) -> None:
    """Advance every row by one token; see `contract.KdaDecode`.

    Args:
        x, weights, pools, rows, out: as there.
        config: launch parameters; from the checked-in table if None.
    """
    N, (S, H, _, D) = x.qkv.shape[0], pools.state.shape
    if N == 0:
        return
    config = config or launch.decode(N * H, D, pools.state.dtype)
    _decode[(N * H,)](
        x.qkv, x.gate, x.beta, x.out_gate, out,
        weights.conv_weight, weights.A_log, weights.dt_bias, weights.norm_weight, weights.norm_eps,
        pools.conv, pools.state, rows.read_slot, rows.write_slot, rows.position, pools.nonfinite,
        S, x.qkv.stride(0), x.gate.stride(0), x.beta.stride(0), x.out_gate.stride(0), out.stride(0),
        *pools.conv.stride()[:2], *pools.state.stride()[:2],
        H=H, D=D, W=weights.conv_weight.shape[0], R=pools.conv.shape[1],
        ROWS=config.rows, FOLD=config.fold,
        num_warps=config.warps, num_stages=1, **launch.pdl(x.qkv.device),
    )  # fmt: skip
