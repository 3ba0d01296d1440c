"""Slots of a prefill in Triton: which one an entry of the table means, and the history that goes into one."""
# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false

from __future__ import annotations

import triton
import triton.language as tl

from kimi_vllm.kernels.cuda.math import everywhere


@triton.jit
def slot_or_null(table_ptr, index, width, num_slots):
    """Return a slot of the table; 0 if the table or the pools have no such entry."""
    slot = tl.load(table_ptr + index, mask=index < width, other=0)
    return tl.where((slot > 0) & (slot < num_slots), slot, 0)


@triton.jit
def export_history(
    slot, read, stop, context, row, head, v, qkv_ptr, conv_pool_ptr, qkv_stride, conv_slot_stride, conv_column_stride,
    H: tl.constexpr, D: tl.constexpr, W: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Write the projections of channels `v` of a head before position `stop`, whose row is `row`, to a slot."""
    source_ptr = conv_pool_ptr + read.to(tl.int64) * conv_slot_stride
    target_ptr = conv_pool_ptr + slot.to(tl.int64) * conv_slot_stride
    for back in tl.static_range(1, W):
        past = stop - back
        column = (past % R) * conv_column_stride
        new = everywhere(past >= context, v.shape)
        old = everywhere((past < context) & (past >= 0) & (read > 0), v.shape)
        for part in tl.static_range(3):
            channel = (part * H + head) * D + v
            x = tl.load(qkv_ptr + (row - back) * qkv_stride + channel, mask=new, other=0.0).to(tl.float32)
            x += tl.load(source_ptr + column + channel, mask=old, other=0.0).to(tl.float32)
            tl.store(
                target_ptr + column + channel, x.to(target_ptr.dtype.element_ty), mask=everywhere(past >= 0, v.shape)
            )
