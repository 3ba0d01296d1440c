"""The rows of a step on CUDA: slots and positions out of a block table, for all layers in one launch.

With windows a slot's state lags: `base` says of each slot how many tokens its state is after, and the records behind it
are of those that follow. Who reads the slot finds there how many records to fold, and who writes it says so there.

In torch this would be ten launches of next to no work, which cost the host more than the device.
"""
# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kimi_vllm.kernels.contract import DecodeRows, WindowRows

_ROWS = 128
_ENTRIES = 128


@triton.jit(do_not_specialize=["num_decodes", "num_requests", "table_stride", "num_slots"])
def _step_rows(
    table_ptr, seq_lens_ptr, query_start_ptr,
    read_slot_ptr, write_slot_ptr, position_ptr, cu_seqlens_ptr, context_len_ptr,
    num_decodes, num_requests, table_stride, num_slots,
    BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Describe ROWS requests: where a decode reads and writes, and where a prefill's tokens lie."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    length = tl.load(seq_lens_ptr + row, mask=row < num_requests, other=0)

    decode = row < num_decodes
    last = length - 1
    entries_ptr = table_ptr + row.to(tl.int64) * table_stride
    # A padded row has length 0: its write and read positions are -1 and -2, and it gets the null slot on both sides.
    write = tl.load(entries_ptr + last // BLOCK_SIZE, mask=decode & (last >= 0), other=0)
    read = tl.load(entries_ptr + (last - 1) // BLOCK_SIZE, mask=decode & (last >= 1), other=0)
    tl.store(write_slot_ptr + row, tl.where((write > 0) & (write < num_slots), write, 0), mask=decode)
    tl.store(read_slot_ptr + row, tl.where((read > 0) & (read < num_slots), read, 0), mask=decode)
    tl.store(position_ptr + row, last.to(tl.int64), mask=decode)

    start = tl.load(query_start_ptr + row, mask=row <= num_requests, other=0)
    stop = tl.load(query_start_ptr + row + 1, mask=row < num_requests, other=0)
    first = tl.load(query_start_ptr + num_decodes)
    prefill = row - num_decodes
    tl.store(cu_seqlens_ptr + prefill, start - first, mask=(prefill >= 0) & (row <= num_requests))
    tl.store(context_len_ptr + prefill, length - (stop - start), mask=(prefill >= 0) & (row < num_requests))


def step_rows(
    table: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    num_decodes: int,
    block_size: int,
    num_slots: int,
    decode: DecodeRows,
    cu_seqlens: Tensor,
    context_len: Tensor,
) -> None:
    """Describe a step whose first `num_decodes` rows decode one token each and whose other rows prefill.

    Args:
        table: ``[N, B]`` int32, rows contiguous; entry j is the slot of the state at the end of block j.
        seq_lens: ``[N]`` int32, tokens after this step; 0 for a padded row.
        query_start: ``[N + 1]`` int32, where each row's tokens begin in the step.
        num_decodes: rows of one token each, before all others.
        block_size: tokens per entry.
        num_slots: slots in the pool; what is outside becomes the null slot.
        decode: at least `num_decodes` rows, written.
        cu_seqlens, context_len: at least ``[N - num_decodes + 1]`` and ``[N - num_decodes]`` int32, written; see
            `contract.PrefillRows`.
    """
    num_requests = seq_lens.shape[0]
    _step_rows[(triton.cdiv(num_requests + 1, _ROWS),)](
        table, seq_lens, query_start, decode.read_slot, decode.write_slot, decode.position, cu_seqlens, context_len,
        num_decodes, num_requests, table.stride(0), num_slots,
        BLOCK_SIZE=block_size, ROWS=_ROWS, num_warps=4,
    )  # fmt: skip


@triton.jit
def _slots(entries_ptr, entry, wanted, num_slots):
    """Load entries of a table; 0 where none is wanted or it is no slot."""
    slot = tl.load(entries_ptr + entry, mask=wanted, other=0)
    return tl.where((slot > 0) & (slot < num_slots), slot, 0)


@triton.jit
def _lag(base_ptr, slot, context, window):
    """Return how many tokens before `context` the state of a slot lacks; 0 of the null slot, at most a window."""
    lag = context - tl.load(base_ptr + slot, mask=slot > 0, other=0)
    return tl.where(slot > 0, tl.minimum(tl.maximum(lag, 0), window), 0).to(tl.int32)


@triton.jit(do_not_specialize=["num_windows", "num_requests", "table_stride", "num_slots", "window"])
def _window_rows(
    table_ptr, seq_lens_ptr, query_start_ptr, base_ptr,
    starts_ptr, position_ptr, read_slot_ptr, write_slot_ptr, second_slot_ptr, num_fold_ptr,
    cu_seqlens_ptr, context_len_ptr, late_fold_ptr,
    num_windows, num_requests, table_stride, num_slots, window,
    BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Describe ROWS windows, or one prefill: its rows follow the programs of the windows."""
    program = tl.program_id(0)
    num_programs = tl.cdiv(num_windows + 1, ROWS)
    if program < num_programs:
        row = program * ROWS + tl.arange(0, ROWS)
        inside = row < num_windows
        start = tl.load(query_start_ptr + row, mask=row <= num_windows, other=0)
        stop = tl.load(query_start_ptr + row + 1, mask=inside, other=0)
        end = tl.load(seq_lens_ptr + row, mask=inside, other=0).to(tl.int64)
        busy = (stop > start) & (end > 0)
        context = tl.where(busy, end - (stop - start), 0)
        entries_ptr = table_ptr + row.to(tl.int64) * table_stride
        read = _slots(entries_ptr, (context - 1) // BLOCK_SIZE, busy & (context > 0), num_slots)
        write = _slots(entries_ptr, context // BLOCK_SIZE, busy, num_slots)
        last = _slots(entries_ptr, (end - 1) // BLOCK_SIZE, busy, num_slots)
        second = tl.where(last == write, 0, last)
        tl.store(starts_ptr + row, start, mask=row <= num_windows)
        tl.store(position_ptr + row, context, mask=inside)
        tl.store(read_slot_ptr + row, read, mask=inside)
        tl.store(write_slot_ptr + row, write, mask=inside)
        tl.store(second_slot_ptr + row, second, mask=inside)
        tl.store(num_fold_ptr + row, _lag(base_ptr, read, context, window), mask=inside)
        tl.debug_barrier()  # a row may write the slot that it reads
        tl.store(base_ptr + write, context, mask=write > 0)
        tl.store(base_ptr + second, context, mask=second > 0)
        return

    prefill = program - num_programs
    row = num_windows + prefill
    first = tl.load(query_start_ptr + num_windows)
    start = tl.load(query_start_ptr + row)
    tl.store(cu_seqlens_ptr + prefill, start - first)
    if row == num_requests:
        return
    length = tl.load(query_start_ptr + row + 1) - start
    end = tl.load(seq_lens_ptr + row)
    context = end - length
    entries_ptr = table_ptr + row.to(tl.int64) * table_stride
    read = _slots(entries_ptr, (context - 1) // BLOCK_SIZE, (length > 0) & (context > 0), num_slots)
    tl.store(context_len_ptr + prefill, context)
    tl.store(late_fold_ptr + prefill, _lag(base_ptr, read, context.to(tl.int64), window))
    # Of a slot that is named twice the later state stays: so first all are cleared, then the largest counts.
    entry = tl.arange(0, ENTRIES)
    first_entry, last_entry = context // BLOCK_SIZE, tl.where(length > 0, (end - 1) // BLOCK_SIZE, -1)
    for clearing in tl.static_range(2):
        tl.debug_barrier()
        for begin in range(first_entry, last_entry + 1, ENTRIES):
            here = begin + entry
            slot = _slots(entries_ptr, here, here <= last_entry, num_slots)
            if clearing == 0:
                tl.store(base_ptr + slot, tl.zeros((ENTRIES,), tl.int64), mask=slot > 0)
            else:
                after = tl.minimum((here + 1) * BLOCK_SIZE, end).to(tl.int64)
                tl.atomic_max(base_ptr + slot, after, mask=slot > 0, sem="relaxed")


def window_rows(
    table: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    num_windows: int,
    block_size: int,
    window: int,
    base: Tensor,
    rows: WindowRows,
    cu_seqlens: Tensor,
    context_len: Tensor,
    num_fold: Tensor,
) -> None:
    """Describe a step whose first `num_windows` rows are windows and whose other rows prefill.

    No row may read a slot that another one writes.

    Args:
        table: ``[N, B]`` int32, rows contiguous; entry j is the slot of the state at the end of block j.
        seq_lens: ``[N]`` int32, tokens after this step; 0 for a padded row.
        query_start: ``[N + 1]`` int32, where each row's tokens begin in the step.
        num_windows: rows of at most `window` tokens each, before all others.
        block_size: tokens per entry, at least `window`.
        window: records of a slot.
        base: ``[S]`` int64, tokens that the state of each slot is after; read, and updated for the slots that are
            written. A slot outside becomes the null slot.
        rows: at least `num_windows` rows, written; position and slots of a padded row are 0.
        cu_seqlens, context_len, num_fold: at least ``[N - num_windows + 1]``, and ``[N - num_windows]`` twice, int32,
            written; see `contract.PrefillRows`.
    """
    num_requests = seq_lens.shape[0]
    _window_rows[(triton.cdiv(num_windows + 1, _ROWS) + num_requests - num_windows + 1,)](
        table, seq_lens, query_start, base,
        rows.cu_seqlens, rows.position, rows.read_slot, rows.write_slot, rows.second_slot, rows.num_fold,
        cu_seqlens, context_len, num_fold,
        num_windows, num_requests, table.stride(0), base.shape[0], window,
        BLOCK_SIZE=block_size, ROWS=_ROWS, ENTRIES=_ENTRIES, num_warps=4,
    )  # fmt: skip
