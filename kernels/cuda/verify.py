"""Verification on CUDA: a window of tokens of every row, of which a prefix may turn out to count, in one launch.

One program owns one head of one row. First come the features of all its tokens, with the convolution's history from
the ring; they go to a scratch of the program, because 16 tokens' do not fit into registers. Then `decode.py`'s loop
over the rows of the state: some are loaded, the records that count are folded, the result is written, and from
registers the window's tokens are run over it one after another. What a token does to the state, and its output before
the norm, is put aside; records and norms come last.

The arithmetic of a token is that of `step.py`, in decode's order. A tile of the state is ``[ROWS/SPREAD, SPREAD, FOLD,
D/FOLD]`` with SPREAD rows for as many warps, and what all rows share, a key for instance, is loaded once a warp: as
``[1, SPREAD, FOLD, D/FOLD]`` Triton lays it out as it lays out the tile, where it would pass it through shared memory.

Threads of a program hand one another what they
wrote, and a window that is run in place writes what others read, its columns of the ring (the newest lies where the
oldest of the history lay) and its records: a barrier stands between each of these three phases.

Programmatic dependent launch as in decode.
"""
# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false
# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, float32

from kimi_vllm.kernels.contract import Activations, Pools, Weights, WindowRows
from kimi_vllm.kernels.cuda import launch
from kimi_vllm.kernels.cuda.math import LOG2E, everywhere, exp2, silu
from kimi_vllm.kernels.cuda.slots import (
    column_ptrs,
    elements,
    head_places,
    matrix_rows,
    pick,
    record_ptr,
    records_to_fold,
    slot_or_null,
)
from kimi_vllm.kernels.cuda.step import (
    decay_and_strength,
    decayed_products,
    delta_rule,
    finish,
    fold_records,
    folded_channels,
    normalise,
)

_SCALARS = 4
"""Numbers of a token in the scratch behind its vectors, of which two are used: rows stay multiples of 16 bytes."""


@triton.jit
def _clear(out_ptr, stride, begin, end, D: tl.constexpr):
    """Write zeros to one head of some rows of the output."""
    for i in range(0, end - begin):
        here_ptrs = out_ptr + (begin + i).to(tl.int64) * stride + tl.arange(0, D)
        tl.store(here_ptrs, tl.zeros((D,), out_ptr.dtype.element_ty))


@triton.jit
def _history(ring_ptr, places, read, position, c, D: tl.constexpr, W: tl.constexpr, R: tl.constexpr, PIECES: tl.constexpr, RING: tl.constexpr):  # fmt: skip  # noqa: E501
    """Load the W-1 projections before `position`, q, k and v of each; zeros where there is no token."""
    found = ()
    for tap in tl.static_range(W - 1):
        past = position - (W - 1) + tap
        column_ptr = column_ptrs(ring_ptr, places, past, D, R, PIECES, RING)
        known = everywhere((past >= 0) & (read > 0), c.shape)
        for part in tl.static_range(3):
            found = found + (tl.load(column_ptr + part * D + c, mask=known, other=0.0).to(tl.float32),)
    return found


@triton.jit
def _keep_history(ring_ptr, places, history, position, c, D: tl.constexpr, W: tl.constexpr, R: tl.constexpr, PIECES: tl.constexpr, RING: tl.constexpr):  # fmt: skip  # noqa: E501
    """Write to another slot than the one read what a window from `position` on, or one that follows, needs of it."""
    for tap in tl.static_range(1, W - 1):
        past = position - (W - 1) + tap
        column_ptr = column_ptrs(ring_ptr, places, past, D, R, PIECES, RING)
        for part in tl.static_range(3):
            x = history[tap * 3 + part].to(ring_ptr.dtype.element_ty)
            tl.store(column_ptr + part * D + c, x, mask=everywhere(past >= 0, c.shape))


@triton.jit
def _projections(qkv_ptr, offset, channels):
    """Load a token's q, k and v before the convolution."""
    found = ()
    for part in tl.static_range(3):
        found = found + (tl.load(qkv_ptr + offset + channels[part]).to(tl.float32),)
    return found


@triton.jit
def _rows(state_ptr, places, first, row, ROWS: tl.constexpr, D: tl.constexpr, PIECES: tl.constexpr):
    """Return where rows of a head's matrix begin, in elements: of `row`, all below ROWS, counted from `first`."""
    UNIT_ROWS: tl.constexpr = D // PIECES
    if ROWS <= UNIT_ROWS:
        unit = elements(pick(places, first // UNIT_ROWS, PIECES), state_ptr)
        return unit + first % UNIT_ROWS * D + row * D
    else:
        return matrix_rows(state_ptr, places, first + row, D, PIECES)


@triton.jit(
    do_not_specialize=["num_rows", "num_tokens", "first_unit"],
    do_not_specialize_on_alignment=[
        "qkv_ptr", "gate_ptr", "beta_ptr", "out_gate_ptr", "out_ptr", "cu_seqlens_ptr", "position_ptr",
        "read_slot_ptr", "write_slot_ptr", "second_slot_ptr", "num_fold_ptr",
    ],
)  # fmt: skip
def _verify(
    qkv_ptr, gate_ptr, beta_ptr, out_gate_ptr, out_ptr,
    conv_weight_ptr, A_log_ptr, dt_bias_ptr, norm_weight_ptr, norm_eps,
    ring_ptr, state_ptr, memory_ptr, pages_ptr,
    cu_seqlens_ptr, position_ptr, read_slot_ptr, write_slot_ptr, second_slot_ptr, num_fold_ptr,
    scratch_ptr, nonfinite_ptr,
    num_rows, num_tokens, num_slots, pages_stride, first_unit,
    qkv_stride, gate_stride, beta_stride, out_gate_stride, out_stride,
    H: tl.constexpr, D: tl.constexpr, W: tl.constexpr, R: tl.constexpr,
    BLOCK_STEPS: tl.constexpr, UNIT_STEPS: tl.constexpr, UNITS: tl.constexpr, PIECES: tl.constexpr, RING: tl.constexpr,
    WINDOW: tl.constexpr, RECORDS: tl.constexpr, FIRST_RECORD: tl.constexpr,
    SCRATCH: tl.constexpr, ROWS: tl.constexpr, SPREAD: tl.constexpr, FOLD: tl.constexpr, launch_pdl: tl.constexpr,
):  # fmt: skip
    """Run one head of one row over its window; the last programs clear rows that belong to nobody."""
    program = tl.program_id(0)
    n, head = program // H, program % H
    c = tl.arange(0, D)
    head_out_ptr = out_ptr + head * D
    begin = tl.load(cu_seqlens_ptr + n)
    if n == num_rows:
        if launch_pdl:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        _clear(head_out_ptr, out_stride, begin, num_tokens, D)
        return
    end = tl.load(cu_seqlens_ptr + n + 1)
    write = slot_or_null(write_slot_ptr, n, num_rows, num_slots)
    if (write == 0) | (end <= begin):
        if launch_pdl:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        _clear(head_out_ptr, out_stride, begin, end, D)
        return
    length = tl.minimum(end - begin, WINDOW)
    read = slot_or_null(read_slot_ptr, n, num_rows, num_slots)
    second = slot_or_null(second_slot_ptr, n, num_rows, num_slots)
    p = tl.load(position_ptr + n)
    count = records_to_fold(num_fold_ptr, n, read, WINDOW)

    # Before the wait: what an earlier kernel than the last one wrote, or nobody; as in decode.
    own = everywhere(read > 0, (ROWS // SPREAD, SPREAD, FOLD, D // FOLD))
    row_index = tl.arange(0, ROWS // SPREAD)[:, None] * SPREAD + tl.arange(0, SPREAD)[None, :]
    column = tl.zeros((1, SPREAD, 1, 1), tl.int32) + folded_channels(FOLD, D)[None]
    unit = first_unit + head * PIECES
    sources = head_places(pages_ptr, read, pages_stride, unit, BLOCK_STEPS, UNIT_STEPS, UNITS, PIECES)
    targets = head_places(pages_ptr, write, pages_stride, unit, BLOCK_STEPS, UNIT_STEPS, UNITS, PIECES)
    others = head_places(pages_ptr, second, pages_stride, unit, BLOCK_STEPS, UNIT_STEPS, UNITS, PIECES)
    elsewhere = _rows(state_ptr, sources, 0, row_index, ROWS, D, PIECES)[:, :, None, None] + column
    loaded = tl.load(state_ptr + elsewhere, mask=own, other=0.0, eviction_policy="evict_first")
    channels, taps = (), ()
    for part in tl.static_range(3):  # q, k, v
        channels = channels + ((part * H + head) * D + c,)
    pasts = _history(ring_ptr, sources, read, p, c, D, W, R, PIECES, RING)
    for tap in tl.static_range(W):
        for part in tl.static_range(3):
            taps = taps + (tl.load(conv_weight_ptr + tap * (3 * H * D) + channels[part]),)
    rate = exp2(tl.load(A_log_ptr + head) * LOG2E)
    bias = tl.load(dt_bias_ptr + head * D + c)
    if launch_pdl:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()

    tl.debug_barrier()  # the history is read
    if read != write:
        _keep_history(ring_ptr, targets, pasts, p, c, D, W, R, PIECES, RING)
    if second > 0:
        _keep_history(ring_ptr, others, pasts, p, c, D, W, R, PIECES, RING)
    act = qkv_ptr.dtype.element_ty
    scratch_head_ptr = scratch_ptr + head * SCRATCH
    coming = _projections(qkv_ptr, begin.to(tl.int64) * qkv_stride, channels)
    for t in range(0, length):
        row = (begin + t).to(tl.int64)
        x = coming
        # The next token's are on their way while this one's are used; the last one loads its own again.
        coming = _projections(qkv_ptr, (begin + tl.minimum(t + 1, length - 1)).to(tl.int64) * qkv_stride, channels)
        gate_ptrs, strength_ptr = gate_ptr + row * gate_stride + head * D + c, beta_ptr + row * beta_stride + head
        g, b = decay_and_strength(gate_ptrs, strength_ptr, rate, bias)
        mixed = ()
        for part in tl.static_range(3):
            total = tl.zeros(c.shape, tl.float32)
            for tap in tl.static_range(W - 1):
                total += pasts[tap * 3 + part] * taps[tap * 3 + part]
            mixed = mixed + (silu(total + x[part] * taps[3 * (W - 1) + part]).to(act).to(tl.float32),)
        pasts = pasts[3:] + x
        q, k, kq = normalise(mixed[0], mixed[1], D)
        here_ptr = scratch_head_ptr + row * (H * SCRATCH)
        tl.store(here_ptr + D + c, k)
        tl.store(here_ptr + 2 * D + c, exp2(g))
        tl.store(here_ptr + 3 * D + c, q)
        tl.store(here_ptr + 4 * D + c, mixed[2])
        tl.store(here_ptr + 5 * D, b)
        tl.store(here_ptr + 5 * D + 1, kq)
        column_ptr = column_ptrs(ring_ptr, targets, p + t, D, R, PIECES, RING)
        copy_ptr = column_ptrs(ring_ptr, others, p + t, D, R, PIECES, RING)
        for part in tl.static_range(3):
            new = x[part].to(ring_ptr.dtype.element_ty)
            tl.store(column_ptr + part * D + c, new)
            tl.store(copy_ptr + part * D + c, new, mask=everywhere(second > 0, c.shape))
    tl.debug_barrier()  # the features are written

    size = tl.zeros(row_index.shape, tl.float32)
    WATCHED: tl.constexpr = nonfinite_ptr is not None and state_ptr.dtype.element_ty == tl.float16
    for first in range(0, D, ROWS):
        s = loaded.to(tl.float32)  # [ROWS/SPREAD, SPREAD, FOLD, D/FOLD]
        if ROWS < D:
            # Behind the last rows nothing is loaded: what would be loaded may have been written by then.
            ahead = (first + ROWS) % D
            elsewhere = _rows(state_ptr, sources, ahead, row_index, ROWS, D, PIECES)[:, :, None, None] + column
            more = own & (ahead > 0)
            loaded = tl.load(state_ptr + elsewhere, mask=more, other=0.0, eviction_policy="evict_first")
        v_rows = first + row_index
        s = fold_records(s, memory_ptr, sources, count, v_rows, column, D, PIECES, RECORDS, FIRST_RECORD)
        stored = s.to(state_ptr.dtype.element_ty)
        here = _rows(state_ptr, targets, first, row_index, ROWS, D, PIECES)[:, :, None, None] + column
        tl.store(state_ptr + here, stored, eviction_policy="evict_first")
        if second > 0:
            here = _rows(state_ptr, others, first, row_index, ROWS, D, PIECES)[:, :, None, None] + column
            tl.store(state_ptr + here, stored, eviction_policy="evict_first")
        if WATCHED:
            rounded = tl.abs(stored.to(tl.float32))
            size = tl.maximum(size, tl.max(tl.max(rounded, axis=-1), axis=-1))
        for t in range(0, length):
            row = (begin + t).to(tl.int64)
            here_ptr = scratch_head_ptr + row * (H * SCRATCH)
            k_tile, d_tile = tl.load(here_ptr + D + column), tl.load(here_ptr + 2 * D + column)
            s, e, o = decayed_products(s, d_tile, tl.load(here_ptr + 3 * D + column), k_tile)
            s, u = delta_rule(s, k_tile, e, tl.load(here_ptr + 4 * D + v_rows), tl.load(here_ptr + 5 * D))
            tl.store(here_ptr + v_rows, u)
            o += u * tl.load(here_ptr + 5 * D + 1)
            tl.store(head_out_ptr + row * out_stride + v_rows, o.to(act))
    tl.debug_barrier()  # the records are folded, and what the new ones are made of is written

    weight = tl.load(norm_weight_ptr + c)
    for t in range(0, length):
        row = (begin + t).to(tl.int64)
        here_ptr = scratch_head_ptr + row * (H * SCRATCH)
        record_ptrs = record_ptr(memory_ptr, targets, t, D, PIECES, RECORDS, FIRST_RECORD) + c
        copy_ptrs = record_ptr(memory_ptr, others, t, D, PIECES, RECORDS, FIRST_RECORD) + c
        for vector in tl.static_range(3):  # u, k, d
            x = tl.load(here_ptr + vector * D + c)
            tl.store(record_ptrs + vector * D, x)
            tl.store(copy_ptrs + vector * D, x, mask=everywhere(second > 0, c.shape))
        o_ptrs = head_out_ptr + row * out_stride + c
        z_ptrs = out_gate_ptr + row * out_gate_stride + head * D + c
        y, square = finish(tl.load(o_ptrs), z_ptrs, weight, norm_eps, D, act)
        tl.store(o_ptrs, y)
        if nonfinite_ptr is not None:
            sick = (square < float("inf")) == 0
            if WATCHED:
                sick = sick | ((t == 0) & (tl.max(tl.max(size, axis=1), axis=0) == float("inf")))
            tl.store(nonfinite_ptr + write * WINDOW + t, 1, mask=sick)
            tl.store(nonfinite_ptr + second * WINDOW + t, 1, mask=sick & (second > 0))


def kda_verify(
    x: Activations,
    weights: Weights,
    pools: Pools,
    rows: WindowRows,
    out: Tensor,
    config: launch.Decode | None = None,
) -> None:
    """Run every row over its window; see `contract.KdaVerify`.

    Args:
        x, weights, pools, rows, out: as there.
        config: launch parameters; from the checked-in table if None.
    """
    T, N, cut = x.qkv.shape[0], rows.position.shape[0], pools.cut
    if T == 0:
        return
    H, D = cut.H, cut.D
    config = config or launch.decode(N * H, D, cut.state_dtype)
    stride = 5 * D + _SCALARS  # a record: u, k, d; q and v; b and k·q
    scratch = x.qkv.new_empty(T * H * stride, dtype=float32)
    _verify[((N + 1) * H,)](
        x.qkv, x.gate, x.beta, x.out_gate, out,
        weights.conv_weight, weights.A_log, weights.dt_bias, weights.norm_weight, weights.norm_eps,
        *launch.typed(pools), launch.records(pools), pools.pages,
        rows.cu_seqlens, rows.position, rows.read_slot, rows.write_slot, rows.second_slot, rows.num_fold,
        scratch, pools.nonfinite,
        N, T, *pools.pages.shape, pools.first_unit,
        x.qkv.stride(0), x.gate.stride(0), x.beta.stride(0), x.out_gate.stride(0), out.stride(0),
        W=weights.conv_weight.shape[0], **launch.sizes(cut), **launch.window_sizes(cut),
        SCRATCH=stride, ROWS=config.rows, SPREAD=config.warps, FOLD=config.fold,
        num_warps=config.warps, num_stages=1, maxnreg=config.registers, **launch.pdl(x.qkv.device),
    )  # fmt: skip
