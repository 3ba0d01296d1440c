"""Slots in Triton: which one an entry of a prefill's table means, where its units lie, and the history it gets.

A slot lies in blocks of memory that its row of the page table names, cut as `cut.Cut` describes. Places are
counted in steps of 16 bytes, of which units and blocks are multiples: so the compiler knows how pointers are aligned.

Kernels take these sizes of a cut, as `launch.sizes` has them: BLOCK_STEPS and UNIT_STEPS, in steps of 16 bytes, UNITS
of a block, PIECES of a head, and RING, where a unit's ring begins, in elements of the ring. Those that fold or write
records take, as `launch.window_sizes` has them, WINDOW, most tokens of a window, RECORDS of a unit, and FIRST_RECORD,
where a unit's begin, in float32 elements.
"""
# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false
# mypy: disable-error-code="assignment, misc"

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
def head_places(pages_ptr, slot, pages_stride, unit, BLOCK_STEPS: tl.constexpr, UNIT_STEPS: tl.constexpr, UNITS: tl.constexpr, PIECES: tl.constexpr):  # fmt: skip  # noqa: E501
    """Return where the units of a head begin, PIECES places from unit `unit` of the slot on.

    The null slot's mean nothing and may not be used.
    """
    row_ptr = pages_ptr + slot.to(tl.int64) * pages_stride
    places = ()
    for piece in tl.static_range(PIECES):
        block = tl.load(row_ptr + (unit + piece) // UNITS).to(tl.int64)
        places = places + (block * BLOCK_STEPS + (unit + piece) % UNITS * UNIT_STEPS,)
    return places


@triton.jit
def pick(places, piece, PIECES: tl.constexpr):
    """Return the place of a piece, or of a block of them."""
    place = places[0]
    for other in tl.static_range(1, PIECES):
        place = tl.where(piece == other, places[other], place)
    return place


@triton.jit
def elements(place, ptr):
    """Return a place in elements of what `ptr` points to."""
    return place * (128 // ptr.dtype.element_ty.primitive_bitwidth)


@triton.jit
def matrix_rows(state_ptr, places, row, D: tl.constexpr, PIECES: tl.constexpr):
    """Return where rows of a head's matrix begin, in elements: int64, of the shape of `row`."""
    ROWS: tl.constexpr = D // PIECES
    return elements(pick(places, row // ROWS, PIECES), state_ptr) + row % ROWS * D


@triton.jit
def column_ptrs(ring_ptr, places, position, D: tl.constexpr, R: tl.constexpr, PIECES: tl.constexpr, RING: tl.constexpr):
    """Return where the columns of a head's ring begin that belong to positions: their q, then k, then v.

    PIECES is a power of two, so that it divides R where it divides 3·R: no column is cut in two.
    """
    COLUMNS: tl.constexpr = R // PIECES
    column = (position % R).to(tl.int32)
    place = elements(pick(places, column // COLUMNS, PIECES), ring_ptr)
    return ring_ptr + place + RING + column % COLUMNS * (3 * D)


@triton.jit
def record_ptr(memory_ptr, places, token, D: tl.constexpr, PIECES: tl.constexpr, RECORDS: tl.constexpr, FIRST_RECORD: tl.constexpr):  # fmt: skip  # noqa: E501
    """Return where a head's record of a window's token begins: its u, then k, then d."""
    place = elements(pick(places, token // RECORDS, PIECES), memory_ptr)
    return memory_ptr + place + FIRST_RECORD + token % RECORDS * (3 * D)


@triton.jit
def records_to_fold(num_fold_ptr, n, read, WINDOW: tl.constexpr):
    """Return how many records of the slot that row n reads count: none of the null slot, and never more than it has."""
    count = tl.load(num_fold_ptr + n)
    return tl.where(read > 0, tl.minimum(tl.maximum(count, 0), WINDOW), 0)


@triton.jit
def export_history(
    slot, read, stop, context, row, head, v, qkv_ptr, qkv_stride, ring_ptr, pages_ptr, pages_stride, unit,
    H: tl.constexpr, D: tl.constexpr, W: tl.constexpr, R: tl.constexpr,
    BLOCK_STEPS: tl.constexpr, UNIT_STEPS: tl.constexpr, UNITS: tl.constexpr, PIECES: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """Write the projections of channels `v` of a head before position `stop`, whose row is `row`, to a slot."""
    sources = head_places(pages_ptr, read, pages_stride, unit, BLOCK_STEPS, UNIT_STEPS, UNITS, PIECES)
    targets = head_places(pages_ptr, slot, pages_stride, unit, BLOCK_STEPS, UNIT_STEPS, UNITS, PIECES)
    for back in tl.static_range(1, W):
        past = stop - back
        source_ptr = column_ptrs(ring_ptr, sources, past, D, R, PIECES, RING)
        target_ptr = column_ptrs(ring_ptr, targets, past, D, R, PIECES, RING)
        new = everywhere(past >= context, v.shape)
        old = everywhere((past < context) & (past >= 0) & (read > 0), v.shape)
        for part in tl.static_range(3):
            channel = (part * H + head) * D + v
            x = tl.load(qkv_ptr + (row - back) * qkv_stride + channel, mask=new, other=0.0).to(tl.float32)
            x += tl.load(source_ptr + part * D + v, mask=old, other=0.0).to(tl.float32)
            tl.store(target_ptr + part * D + v, x.to(ring_ptr.dtype.element_ty), mask=everywhere(past >= 0, v.shape))
