"""The rows of a step on CUDA: slots and positions out of a block table, for all layers in one launch.

In torch this would be ten launches of next to no work, which cost the host more than the device.
"""
# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kimi_vllm.kernels.contract import DecodeRows

_ROWS = 128


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
