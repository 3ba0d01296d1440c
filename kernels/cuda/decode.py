"""Decode on CUDA: one token of every row in one launch per layer.

One program owns one head of one row. It runs the short convolution from the ring, SiLU, L2 norm, gate, write
strength, the state update and the gated norm; `step.py` has the formulas.

What bounds it is the state: read once, written once, 128 KiB per head with D=128 in float32. A program's arithmetic
and its order do not depend on what else is in the batch, so neither does a row's result, bit by bit; the launch table
keeps it so across batch sizes by changing only how many rows of the state are in flight (NOTES.md).

Programmatic dependent launch: slots, positions, weights, pools and the first state tile are read before the kernel
ahead has ended. They must not be what that one kernel writes; activations may.
"""
# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false
# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kimi_vllm.kernels.contract import Activations, DecodeRows, Pools, Weights
from kimi_vllm.kernels.cuda import launch
from kimi_vllm.kernels.cuda.math import LOG2E, everywhere, exp2, largest, silu
from kimi_vllm.kernels.cuda.slots import column_ptrs, head_places
from kimi_vllm.kernels.cuda.step import (
    decay_and_strength,
    decayed_products,
    delta_rule,
    finish,
    fold,
    normalise,
    state_tile,
)


@triton.jit
def _past(ring_ptr, places, conv_weight_ptr, slot, position, vector, channel, WIDTH: tl.constexpr, D: tl.constexpr, W: tl.constexpr, R: tl.constexpr, PIECES: tl.constexpr, RING: tl.constexpr):  # fmt: skip  # noqa: E501
    """Convolve the W-1 projections before `position`; zeros where there is no token."""
    total = tl.zeros(channel.shape, tl.float32)  # [D]
    for tap in tl.static_range(W - 1):
        past = position - (W - 1) + tap
        x = tl.load(
            column_ptrs(ring_ptr, places, past, D, R, PIECES, RING) + vector,
            mask=everywhere((past >= 0) & (slot > 0), channel.shape),
            other=0.0,
        )
        total += x.to(tl.float32) * tl.load(conv_weight_ptr + tap * WIDTH + channel)
    return total


@triton.jit
def _keep(ring_ptr, sources, targets, x, read, write, position, vector, D: tl.constexpr, W: tl.constexpr, R: tl.constexpr, PIECES: tl.constexpr, RING: tl.constexpr):  # fmt: skip  # noqa: E501
    """Write the current projection into its column; in another slot than the one read, complete the history."""
    tl.store(column_ptrs(ring_ptr, targets, position, D, R, PIECES, RING) + vector, x.to(ring_ptr.dtype.element_ty))
    if read != write:
        for tap in tl.static_range(1, W - 1):
            past = position - (W - 1) + tap
            old = tl.load(
                column_ptrs(ring_ptr, sources, past, D, R, PIECES, RING) + vector,
                mask=everywhere((past >= 0) & (read > 0), vector.shape),
                other=0.0,
            )
            target_ptrs = column_ptrs(ring_ptr, targets, past, D, R, PIECES, RING) + vector
            tl.store(target_ptrs, old, mask=everywhere(past >= 0, vector.shape))


# A step's tensors start anywhere: a variant for each alignment would be compiled while serving.
@triton.jit(
    do_not_specialize=["first_unit"],
    do_not_specialize_on_alignment=["qkv_ptr", "gate_ptr", "beta_ptr", "out_gate_ptr", "out_ptr", "read_slot_ptr", "write_slot_ptr", "position_ptr"],  # noqa: E501
)  # fmt: skip
def _decode(
    qkv_ptr, gate_ptr, beta_ptr, out_gate_ptr, out_ptr,
    conv_weight_ptr, A_log_ptr, dt_bias_ptr, norm_weight_ptr, norm_eps,
    ring_ptr, state_ptr, pages_ptr, read_slot_ptr, write_slot_ptr, position_ptr, nonfinite_ptr,
    num_slots, pages_stride, first_unit, qkv_stride, gate_stride, beta_stride, out_gate_stride, out_stride,
    H: tl.constexpr, D: tl.constexpr, W: tl.constexpr, R: tl.constexpr,
    BLOCK_STEPS: tl.constexpr, UNIT_STEPS: tl.constexpr, UNITS: tl.constexpr, PIECES: tl.constexpr, RING: tl.constexpr,
    FLAGS: tl.constexpr, ROWS: tl.constexpr, FOLD: tl.constexpr, launch_pdl: tl.constexpr,
):  # fmt: skip
    """Advance one head of one row; ROWS value channels of the state at a time."""
    program = tl.program_id(0)
    n, head = program // H, program % H
    read = tl.load(read_slot_ptr + n)
    write = tl.load(write_slot_ptr + n)
    p = tl.load(position_ptr + n)
    c = tl.arange(0, D)
    out_ptrs = out_ptr + n.to(tl.int64) * out_stride + head * D + c
    live = (write > 0) & (write < num_slots) & (read >= 0) & (read < num_slots)
    if live:
        # Before the wait: what an earlier kernel than the last one wrote, or nobody. The first tile of the state is on
        # its way while the kernel ahead still runs.
        own = everywhere(read > 0, (ROWS, FOLD, D // FOLD))
        unit = first_unit + head * PIECES
        sources = head_places(pages_ptr, read, pages_stride, unit, BLOCK_STEPS, UNIT_STEPS, UNITS, PIECES)
        targets = head_places(pages_ptr, write, pages_stride, unit, BLOCK_STEPS, UNIT_STEPS, UNITS, PIECES)
        source_ptrs = state_tile(state_ptr, sources, 0, ROWS, FOLD, D, PIECES)
        loaded = tl.load(source_ptrs, mask=own, other=0.0, eviction_policy="evict_first")  # [ROWS, FOLD, D/FOLD]
        WIDTH: tl.constexpr = 3 * H * D
        last_tap_ptr = conv_weight_ptr + (W - 1) * WIDTH
        channels, pasts, taps = (), (), ()
        for part in tl.static_range(3):  # q, k, v
            channels = channels + ((part * H + head) * D + c,)
        for part in tl.static_range(3):
            past = _past(
                ring_ptr, sources, conv_weight_ptr, read, p, part * D + c, channels[part], WIDTH, D, W, R, PIECES, RING
            )
            pasts = pasts + (past,)
        for part in tl.static_range(3):
            taps = taps + (tl.load(last_tap_ptr + channels[part]),)
        rate = exp2(tl.load(A_log_ptr + head) * LOG2E)
        bias = tl.load(dt_bias_ptr + head * D + c)
        if launch_pdl:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()

        # From here on: activations, which the kernel ahead wrote.
        row = n.to(tl.int64)
        qkv_row_ptr = qkv_ptr + row * qkv_stride
        projections = ()
        for part in tl.static_range(3):
            projections = projections + (tl.load(qkv_row_ptr + channels[part]).to(tl.float32),)
        gate_ptrs, strength_ptr = gate_ptr + row * gate_stride + head * D + c, beta_ptr + row * beta_stride + head
        g, b = decay_and_strength(gate_ptrs, strength_ptr, rate, bias)
        act = qkv_ptr.dtype.element_ty
        mixed = ()
        for part in tl.static_range(3):
            x = silu(pasts[part] + projections[part] * taps[part])
            mixed = mixed + (x.to(act).to(tl.float32),)
        q, k, kq = normalise(mixed[0], mixed[1], D)
        d_tile, q_tile, k_tile = fold(exp2(g), FOLD, D), fold(q, FOLD, D), fold(k, FOLD, D)
        for part in tl.static_range(3):
            x = projections[part]
            _keep(ring_ptr, sources, targets, x, read, write, p, part * D + c, D, W, R, PIECES, RING)

        # The next rows of the state are loaded while these are advanced. A row's value and its output are picked from
        # all by masks: a block cannot be indexed.
        STEPS: tl.constexpr = D // ROWS
        v_rows = tl.reshape(mixed[2], (STEPS, ROWS))
        step_index = tl.arange(0, STEPS)[:, None]
        o = tl.zeros((STEPS, ROWS), tl.float32)
        size = tl.zeros((ROWS,), tl.float32)
        WATCHED: tl.constexpr = nonfinite_ptr is not None and state_ptr.dtype.element_ty == tl.float16
        for step in tl.static_range(STEPS):
            s = loaded.to(tl.float32)
            if step + 1 < STEPS:
                source_ptrs = state_tile(state_ptr, sources, (step + 1) * ROWS, ROWS, FOLD, D, PIECES)
                loaded = tl.load(source_ptrs, mask=own, other=0.0, eviction_policy="evict_first")
            s, e, o_rows = decayed_products(s, d_tile, q_tile, k_tile)
            v = tl.sum(tl.where(step_index == step, v_rows, 0.0), axis=0)  # [ROWS]
            s, u = delta_rule(s, k_tile, e, v, b)
            stored = s.to(state_ptr.dtype.element_ty)
            target_ptrs = state_tile(state_ptr, targets, step * ROWS, ROWS, FOLD, D, PIECES)
            tl.store(target_ptrs, stored, eviction_policy="evict_first")
            if WATCHED:
                size = tl.maximum(size, largest(stored.to(tl.float32)))
            o = tl.where(step_index == step, (o_rows + u * kq)[None, :], o)

        z_ptrs = out_gate_ptr + row * out_gate_stride + head * D + c
        y, square = finish(tl.reshape(o, (D,)), tl.load(z_ptrs), tl.load(norm_weight_ptr + c), norm_eps, D, act)
        tl.store(out_ptrs, y)
        if nonfinite_ptr is not None:
            sick = (square < float("inf")) == 0
            if WATCHED:
                sick = sick | (tl.max(size, axis=0) == float("inf"))
            tl.store(nonfinite_ptr + write * FLAGS, 1, mask=sick)
    else:
        if launch_pdl:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        tl.store(out_ptrs, tl.zeros((D,), tl.float32).to(out_ptr.dtype.element_ty))


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
    N, cut = x.qkv.shape[0], pools.cut
    if N == 0:
        return
    H, D = cut.H, cut.D
    config = config or launch.decode(N * H, D, cut.state_dtype)
    _decode[(N * H,)](
        x.qkv, x.gate, x.beta, x.out_gate, out,
        weights.conv_weight, weights.A_log, weights.dt_bias, weights.norm_weight, weights.norm_eps,
        *launch.typed(pools), pools.pages, rows.read_slot, rows.write_slot, rows.position, pools.nonfinite,
        *pools.pages.shape, pools.first_unit,
        x.qkv.stride(0), x.gate.stride(0), x.beta.stride(0), x.out_gate.stride(0), out.stride(0),
        W=weights.conv_weight.shape[0], **launch.sizes(cut),
        FLAGS=cut.flags, ROWS=config.rows, FOLD=config.fold,
        num_warps=config.warps, num_stages=1, maxnreg=config.registers, **launch.pdl(x.qkv.device),
    )  # fmt: skip
