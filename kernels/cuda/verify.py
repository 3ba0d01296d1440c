"""Verification on CUDA: a window of tokens of every row, of which a prefix may turn out to count, in one launch.

One program owns one head of one row. Running the window's tokens over the state one after another, as decode does with
one, takes longer than reading and writing the state. So the state is read once for all of them. With S the state after
the records that count, d_t the decay of token t and c_t the product of those of tokens 1..t, Eq. 1 unrolled is

    e_t = S (c_t k_t) + sum_{i<t} u_i A_ti        A_ti = (k_i d_{i+1} .. d_t) · k_t
    o_t = S (c_t q_t) + sum_{i<t} u_i B_ti + u_t (k_t · q_t)        B_ti = (k_i d_{i+1} .. d_t) · q_t
    u_t = b_t (v_t - e_t)

where products of vectors of channels are by element. A and B are small and the same for all rows of the state, and u
and o are linear in S and v: u_t = x_t - S y_t and o_t = x'_t + S y'_t, with x and x' of the rows' values, and y and y'
of keys and queries, by substitution, token after token:

    y_t = b_t (c_t k_t - sum_{i<t} A_ti y_i)        y'_t = c_t q_t - sum_{i<t} B_ti y_i - (k_t · q_t) y_t
    x_t = b_t (v_t - sum_{i<t} A_ti x_i)            x'_t = sum_{i<t} B_ti x_i + (k_t · q_t) x_t

So S meets all of y and y' in one matrix product of the tensor cores, in three passes of TensorFloat-32 that keep what
float32 has; tiles of it are as many columns wide as registers allow, and products add up along a row of tiles. No decay
is divided by: it may be 0. What comes of a token depends on no later one, whatever that holds.

A thread has a channel of all tokens until x and y are there. All sums over channels that A, B and the norms need are
taken at once, because each trip through shared memory waits for all warps. x and y go to the tiles through a scratch in
memory. Threads of a program hand one another what they wrote, and a window that is run in place writes what others
read, its columns of the ring (the newest lies where the oldest of the history lay) and its records: a barrier stands
between each of these phases. New u replace old ones a row of tiles at a time: a u comes of the whole row, so of every
old u of it that was loaded.

Programmatic dependent launch as in decode.
"""
# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false
# mypy: disable-error-code="assignment, misc, var-annotated"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, float32

from kimi_vllm.kernels.contract import Activations, Pools, Weights, WindowRows
from kimi_vllm.kernels.cuda import launch
from kimi_vllm.kernels.cuda.math import LOG2E, channel_sums, everywhere, exp2, prefetch, silu
from kimi_vllm.kernels.cuda.slots import (
    column_ptrs,
    head_places,
    matrix_rows,
    record_ptr,
    records_to_fold,
    slot_or_null,
)
from kimi_vllm.kernels.cuda.step import decay_and_strength, finish, replay, unit_scales

_VECTORS = tl.constexpr(4)
"""Vectors of a token in the scratch: -y, y', x and x'."""

_FEWEST_TOKENS = 4
"""A matrix product of the tensor cores has at least eight columns, two a token."""


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
    """Write to another slot than the one read what a window that begins after `position` needs of it.

    One token of a window counts at least, so no window begins where this one does again.
    """
    for tap in tl.static_range(1, W - 1):
        past = position - (W - 1) + tap
        column_ptr = column_ptrs(ring_ptr, places, past, D, R, PIECES, RING)
        for part in tl.static_range(3):
            x = history[tap * 3 + part].to(ring_ptr.dtype.element_ty)
            tl.store(column_ptr + part * D + c, x, mask=everywhere(past >= 0, c.shape))


@triton.jit
def _tile_begin(tile, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the first row and column of a tile: all of some rows before the next."""
    return tile // (D // COLUMNS) * ROWS, tile % (D // COLUMNS) * COLUMNS


@triton.jit
def _tile_ptrs(state_ptr, places, tile, D: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip  # noqa: E501
    """Return where the elements of a tile of a head's matrix lie: ``[ROWS, COLUMNS]``."""
    down, across = _tile_begin(tile, D, ROWS, COLUMNS)
    rows = matrix_rows(state_ptr, places, down + tl.arange(0, ROWS)[:, None], D, PIECES)
    return state_ptr + rows + across + tl.arange(0, COLUMNS)[None, :]


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
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, launch_pdl: tl.constexpr,
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

    # Before the wait: what an earlier kernel than the last one wrote, or nobody; as in decode. Nothing is written: the
    # scratch may be what the kernel ahead still reads.
    own = everywhere(read > 0, (ROWS, COLUMNS))
    TILES: tl.constexpr = D // ROWS * (D // COLUMNS)
    unit = first_unit + head * PIECES
    sources = head_places(pages_ptr, read, pages_stride, unit, BLOCK_STEPS, UNIT_STEPS, UNITS, PIECES)
    targets = head_places(pages_ptr, write, pages_stride, unit, BLOCK_STEPS, UNIT_STEPS, UNITS, PIECES)
    others = head_places(pages_ptr, second, pages_stride, unit, BLOCK_STEPS, UNIT_STEPS, UNITS, PIECES)
    tile_ptrs = _tile_ptrs(state_ptr, sources, 0, D, PIECES, ROWS, COLUMNS)
    loaded = tl.load(tile_ptrs, mask=own, other=0.0, eviction_policy="evict_first")
    for record in range(0, count):
        past_ptr = record_ptr(memory_ptr, sources, record, D, PIECES, RECORDS, FIRST_RECORD) + c
        for vector in tl.static_range(3):
            prefetch(past_ptr + vector * D)
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

    # A window that is not full repeats its last token: what comes of it is not kept.
    projections = pasts
    for t in tl.static_range(WINDOW):
        qkv_row_ptr = qkv_ptr + (begin + tl.minimum(length - 1, t)).to(tl.int64) * qkv_stride
        for part in tl.static_range(3):
            projections = projections + (tl.load(qkv_row_ptr + channels[part]).to(tl.float32),)
    act = qkv_ptr.dtype.element_ty
    queries, keys, written, decays, strengths = (), (), (), (), ()
    for t in tl.static_range(WINDOW):
        mixed = ()
        for part in tl.static_range(3):
            total = tl.zeros((D,), tl.float32)
            for tap in tl.static_range(W - 1):
                total += projections[(t + tap) * 3 + part] * taps[tap * 3 + part]
            x = silu(total + projections[(t + W - 1) * 3 + part] * taps[3 * (W - 1) + part])
            mixed = mixed + (x.to(act).to(tl.float32),)
        queries, keys, written = queries + (mixed[0],), keys + (mixed[1],), written + (mixed[2],)
        row = (begin + tl.minimum(length - 1, t)).to(tl.int64)
        gate_ptrs, strength_ptr = gate_ptr + row * gate_stride + head * D + c, beta_ptr + row * beta_stride + head
        g, b = decay_and_strength(gate_ptrs, strength_ptr, rate, bias)
        decays, strengths = decays + (exp2(g),), strengths + (b,)

    # All sums over channels at once, of keys and queries as they are: the norms that these sums give are factors.
    summands, left = (), ()  # left: k_i d_{i+1} .. d_t
    for t in tl.static_range(WINDOW):
        q, k = queries[t], keys[t]
        summands = summands + (q * q, k * k, k * q)
        rest = ()
        for i in tl.static_range(t):
            rest = rest + (left[i] * decays[t],)
            summands = summands + (rest[i] * k, rest[i] * q)
        left = rest + (k,)
    sums = channel_sums(summands, WINDOW * (WINDOW + 2))

    token_ptr = scratch_ptr + begin.to(tl.int64) * (H * _VECTORS * D) + head * (_VECTORS * D)
    passed = tl.full((D,), 1.0, tl.float32)  # c_t
    held, kept, units, k_scales = (), (), (), ()  # y, x and k
    for t in tl.static_range(WINDOW):
        q_scale, k_scale = unit_scales(sums[t * (t + 2)], sums[t * (t + 2) + 1], D)
        b, kq = strengths[t], sums[t * (t + 2) + 2] * q_scale * k_scale
        passed *= decays[t]
        k = keys[t] * k_scale
        y, asked = passed * k, passed * (queries[t] * q_scale)
        x, answer = written[t], tl.zeros((D,), tl.float32)
        for i in tl.static_range(t):
            among_keys = sums[t * (t + 2) + 3 + 2 * i] * (k_scales[i] * k_scale)  # A_ti
            among_queries = sums[t * (t + 2) + 4 + 2 * i] * (k_scales[i] * q_scale)  # B_ti
            y -= among_keys * held[i]
            x -= among_keys * kept[i]
            asked -= among_queries * held[i]
            answer += among_queries * kept[i]
        y, x = b * y, b * x
        held, kept, units, k_scales = held + (y,), kept + (x,), units + (k,), k_scales + (k_scale,)
        counts = everywhere(length > t, (D,))
        here_ptr = token_ptr + t * (H * _VECTORS * D) + c
        tl.store(here_ptr, -y, mask=counts)
        tl.store(here_ptr + D, asked - kq * y, mask=counts)
        tl.store(here_ptr + 2 * D, x, mask=counts)
        tl.store(here_ptr + 3 * D, answer + kq * x, mask=counts)
    tl.debug_barrier()  # the history is read, and x and y are written

    if read != write:
        _keep_history(ring_ptr, targets, pasts, p, c, D, W, R, PIECES, RING)
    if second > 0:
        _keep_history(ring_ptr, others, pasts, p, c, D, W, R, PIECES, RING)
    for t in tl.static_range(WINDOW):
        column_ptr = column_ptrs(ring_ptr, targets, p + t, D, R, PIECES, RING)
        copy_ptr = column_ptrs(ring_ptr, others, p + t, D, R, PIECES, RING)
        for part in tl.static_range(3):
            new = projections[(t + W - 1) * 3 + part].to(ring_ptr.dtype.element_ty)
            tl.store(column_ptr + part * D + c, new, mask=everywhere(length > t, (D,)))
            tl.store(copy_ptr + part * D + c, new, mask=everywhere((length > t) & (second > 0), (D,)))

    # Columns are u of all tokens, then o.
    column = tl.arange(0, 2 * TOKENS)
    token = column % TOKENS
    there = token < length
    column_at = token_ptr + token * (H * _VECTORS * D) + column // TOKENS * D
    is_u = (there & (column < TOKENS))[None, :]
    is_o = (there & (column >= TOKENS))[None, :]
    u_ptrs = record_ptr(memory_ptr, targets, token, D, PIECES, RECORDS, FIRST_RECORD)[None, :]
    copy_ptrs = record_ptr(memory_ptr, others, token, D, PIECES, RECORDS, FIRST_RECORD)[None, :]
    o_ptrs = head_out_ptr + (begin + token).to(tl.int64)[None, :] * out_stride
    WATCHED: tl.constexpr = nonfinite_ptr is not None and state_ptr.dtype.element_ty == tl.float16
    size = tl.zeros((ROWS,), tl.float32)
    products = tl.zeros((ROWS, 2 * TOKENS), tl.float32)
    for tile in range(0, TILES):
        s = loaded.to(tl.float32)
        # Behind the last tile nothing is loaded: what would be loaded may have been written by then.
        ahead = (tile + 1) % TILES
        tile_ptrs = _tile_ptrs(state_ptr, sources, ahead, D, PIECES, ROWS, COLUMNS)
        loaded = tl.load(tile_ptrs, mask=own & (ahead > 0), other=0.0, eviction_policy="evict_first")
        down, across = _tile_begin(tile, D, ROWS, COLUMNS)
        i_v, i_k = down + tl.arange(0, ROWS)[:, None], across + tl.arange(0, COLUMNS)[None, :]
        # Unrolled, so that all records are on their way at once. Of one that does not count nothing is read.
        for past in tl.static_range(WINDOW):
            past_ptr = record_ptr(memory_ptr, sources, past, D, PIECES, RECORDS, FIRST_RECORD)
            folded = count > past
            past_u = tl.load(past_ptr + i_v, mask=everywhere(folded, (ROWS, 1)), other=0.0)
            past_k = tl.load(past_ptr + D + i_k, mask=everywhere(folded, (1, COLUMNS)), other=0.0)
            past_d = tl.load(past_ptr + 2 * D + i_k, mask=everywhere(folded, (1, COLUMNS)), other=1.0)
            s = replay(s, past_u, past_k, past_d)
        stored = s.to(state_ptr.dtype.element_ty)
        tile_ptrs = _tile_ptrs(state_ptr, targets, tile, D, PIECES, ROWS, COLUMNS)
        tl.store(tile_ptrs, stored, eviction_policy="evict_first")
        if second > 0:
            tile_ptrs = _tile_ptrs(state_ptr, others, tile, D, PIECES, ROWS, COLUMNS)
            tl.store(tile_ptrs, stored, eviction_policy="evict_first")
        if WATCHED:
            size = tl.maximum(size, tl.max(tl.abs(stored.to(tl.float32)), axis=1))
        facing = across + tl.arange(0, COLUMNS)[:, None]
        wanted = tl.load(column_at[None, :] + facing, mask=there[None, :], other=0.0)  # [COLUMNS, 2 TOKENS]
        products = tl.dot(s, wanted, products, input_precision="tf32x3")  # [ROWS, 2 TOKENS]
        if across == D - COLUMNS:
            products += tl.load(column_at[None, :] + 2 * D + i_v, mask=there[None, :], other=0.0)
            tl.store(u_ptrs + i_v, products, mask=is_u)
            tl.store(copy_ptrs + i_v, products, mask=is_u & everywhere(second > 0, (1, 2 * TOKENS)))
            tl.store(o_ptrs + i_v, products.to(act), mask=is_o)
            products = tl.zeros((ROWS, 2 * TOKENS), tl.float32)
    tl.debug_barrier()  # the records are folded, and o is written

    for t in tl.static_range(WINDOW):
        record_ptrs = record_ptr(memory_ptr, targets, t, D, PIECES, RECORDS, FIRST_RECORD) + c
        copy_ptr = record_ptr(memory_ptr, others, t, D, PIECES, RECORDS, FIRST_RECORD) + c
        counts, twice = everywhere(length > t, (D,)), everywhere((length > t) & (second > 0), (D,))
        tl.store(record_ptrs + D, units[t], mask=counts)
        tl.store(record_ptrs + 2 * D, decays[t], mask=counts)
        tl.store(copy_ptr + D, units[t], mask=twice)
        tl.store(copy_ptr + 2 * D, decays[t], mask=twice)
    token = tl.arange(0, TOKENS)
    inside = (token < length)[:, None]
    row = (begin + token).to(tl.int64)[:, None]
    y_ptrs = head_out_ptr + row * out_stride + c[None, :]
    z_ptrs = out_gate_ptr + row * out_gate_stride + head * D + c[None, :]
    o, z = tl.load(y_ptrs, mask=inside, other=0.0), tl.load(z_ptrs, mask=inside, other=0.0)
    y, square = finish(o, z, tl.load(norm_weight_ptr + c)[None, :], norm_eps, D, act)
    tl.store(y_ptrs, y, mask=inside)
    if nonfinite_ptr is not None:
        sick = (square < float("inf")) == 0
        if WATCHED:
            sick = sick | (tl.where(token == 0, tl.max(size, axis=0), 0.0) == float("inf"))
        sick = sick & (token < length)
        tl.store(nonfinite_ptr + write * WINDOW + token, 1, mask=sick)
        tl.store(nonfinite_ptr + second * WINDOW + token, 1, mask=sick & everywhere(second > 0, (TOKENS,)))


def kda_verify(
    x: Activations,
    weights: Weights,
    pools: Pools,
    rows: WindowRows,
    out: Tensor,
    config: launch.Windows | None = None,
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
    config = config or launch.windows(N * H, D, cut.state_dtype)
    scratch = x.qkv.new_empty(T * H * _VECTORS.value * D, dtype=float32)
    _verify[((N + 1) * H,)](
        x.qkv, x.gate, x.beta, x.out_gate, out,
        weights.conv_weight, weights.A_log, weights.dt_bias, weights.norm_weight, weights.norm_eps,
        *launch.typed(pools), launch.records(pools), pools.pages,
        rows.cu_seqlens, rows.position, rows.read_slot, rows.write_slot, rows.second_slot, rows.num_fold,
        scratch, pools.nonfinite,
        N, T, *pools.pages.shape, pools.first_unit,
        x.qkv.stride(0), x.gate.stride(0), x.beta.stride(0), x.out_gate.stride(0), out.stride(0),
        W=weights.conv_weight.shape[0], **launch.sizes(cut), **launch.window_sizes(cut),
        ROWS=min(config.rows, D), COLUMNS=min(config.columns, D),
        TOKENS=max(_FEWEST_TOKENS, triton.next_power_of_2(cut.window)),
        num_warps=config.warps, num_stages=1, maxnreg=config.registers, **launch.pdl(x.qkv.device),
    )  # fmt: skip
