"""How a state is cut into units, and that a slot is read and written where they lie and nowhere else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kda_case import same_bits
from torch import Tensor

from kimi_vllm.kernels.bench.layer import scattered
from kimi_vllm.kernels.contract import Pools
from kimi_vllm.kernels.cut import Cut

FP32, BF16 = torch.float32, torch.bfloat16
BLOCK = 7 * 64 * 576 * 2
"""Bytes of a block of the released model: seven MLA layers of 64 tokens in bfloat16."""


@pytest.mark.parametrize(
    ("layers", "H", "R", "state_dtype", "block_bytes", "pieces", "units", "blocks"),
    [
        pytest.param(20, 32, 4, FP32, BLOCK, 2, 15, 86, id="48B"),
        pytest.param(20, 16, 4, FP32, BLOCK, 2, 15, 43, id="48B-TP2"),
        pytest.param(20, 8, 4, FP32, BLOCK, 2, 15, 22, id="48B-TP4"),
        pytest.param(20, 32, 4, BF16, BLOCK, 4, 57, 45, id="48B-bf16"),
        pytest.param(20, 32, 4, FP32, BLOCK // 2, 4, 15, 171, id="48B-fp8-latents"),
        pytest.param(20, 32, 4, FP32, 2 * BLOCK, 1, 15, 43, id="48B-128-tokens"),
        pytest.param(11, 32, 4, FP32, 4 * BLOCK // 7, 4, 17, 83, id="48B-a-stage-of-two"),
        pytest.param(20, 32, 5, FP32, BLOCK, 1, 7, 92, id="odd-ring"),
        pytest.param(20, 32, 8, FP32, BLOCK, 8, 57, 90, id="eight-columns"),
    ],
)
def test_the_cut_with_the_fewest_blocks(
    layers: int, H: int, R: int, state_dtype: torch.dtype, block_bytes: int, pieces: int, units: int, blocks: int
) -> None:
    cut = Cut.fewest_blocks(layers, H, 128, R, state_dtype, BF16, block_bytes)
    assert (cut.pieces, cut.units, cut.blocks(layers)) == (pieces, units, blocks)


def test_a_half_head_of_the_released_model() -> None:
    cut = Cut.fewest_blocks(20, 32, 128, 4, FP32, BF16, BLOCK)
    assert (cut.rows, cut.vectors, cut.state_bytes, cut.unit_bytes) == (64, 6, 32768, 34304)
    assert cut.units * cut.unit_bytes / BLOCK > 0.997


@given(
    layers=st.integers(1, 24),
    H=st.integers(1, 32),
    D=st.sampled_from([64, 128]),
    R=st.integers(2, 16),
    state_dtype=st.sampled_from([FP32, BF16]),
    block_bytes=st.integers(8192, 2 * BLOCK),
)
def test_no_other_cut_needs_fewer_blocks(
    layers: int, H: int, D: int, R: int, state_dtype: torch.dtype, block_bytes: int
) -> None:
    possible = {}
    for pieces in (2**n for n in range(8) if 3 * R % 2**n == 0 and 2**n <= D):
        unit = (D * D * state_dtype.itemsize + 3 * R * D * 2) // pieces
        if unit <= block_bytes:
            possible[pieces] = -(-layers * H * pieces // (block_bytes // unit))
    if not possible:
        with pytest.raises(ValueError, match="larger --block-size"):
            Cut.fewest_blocks(layers, H, D, R, state_dtype, BF16, block_bytes)
        return
    cut = Cut.fewest_blocks(layers, H, D, R, state_dtype, BF16, block_bytes)
    fewest = min(possible.values())
    assert cut.blocks(layers) == fewest
    assert cut.pieces == min(pieces for pieces, blocks in possible.items() if blocks == fewest)
    assert 0 < cut.units * cut.unit_bytes <= block_bytes


@pytest.mark.parametrize(("R", "smallest"), [(4, 17152), (5, 69376)])
def test_a_block_that_holds_no_piece_is_refused(R: int, smallest: int) -> None:
    with pytest.raises(
        ValueError, match=f"a block of {smallest - 16} bytes holds no part of a KDA head: .*--block-size"
    ):
        Cut.fewest_blocks(20, 32, 128, R, FP32, BF16, smallest - 16)
    assert Cut.fewest_blocks(20, 32, 128, R, FP32, BF16, smallest).units == 1


def written(pools: Pools, slot: int, state: Tensor | None, ring: Tensor | None) -> Tensor:
    """Return memory as it must be once a slot was stored: unit after unit, by the words of `Cut`."""
    cut, memory = pools.cut, pools.memory.clone()
    for head in range(cut.H):
        for piece in range(cut.pieces):
            number = pools.first_unit + head * cut.pieces + piece
            block = memory[int(pools.pages[slot, number // cut.units])]
            at = number % cut.units * cut.unit_bytes
            if state is not None:
                rows = state[head, piece * cut.rows : (piece + 1) * cut.rows]
                block[at : at + cut.state_bytes] = rows.contiguous().view(torch.uint8).flatten()
            at += cut.state_bytes
            for vector in range(piece * cut.vectors, (piece + 1) * cut.vectors) if ring is not None else ():
                column, part = divmod(vector, 3)
                values = ring[column].view(3, cut.H, cut.D)[part, head]
                size = cut.D * cut.conv_dtype.itemsize
                block[at : at + size] = values.contiguous().view(torch.uint8)
                at += size
    return memory


@settings(max_examples=40, deadline=None)
@given(
    H=st.integers(1, 3),
    R=st.sampled_from([4, 8, 12]),
    dtypes=st.tuples(st.sampled_from([FP32, BF16]), st.sampled_from([FP32, BF16, torch.float16])),
    pieces=st.sampled_from([1, 2, 4]),
    units=st.integers(1, 7),
    layer=st.integers(0, 2),
    slot=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_a_slot_comes_back_and_nothing_beside_it_changes(
    H: int,
    R: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    pieces: int,
    units: int,
    layer: int,
    slot: int,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    conv = torch.randn(4, R, 3 * H * 64, generator=generator).to(dtypes[1])
    states = torch.randn(4, H, 64, 64, generator=generator).to(dtypes[0])
    pools = scattered(conv, states, pieces=pieces, units=units, layer=layer)
    assert all(same_bits(ours, given) for ours, given in zip(pools.dense(), (conv, states), strict=True))
    state, ring = torch.randn_like(states[0]), torch.randn_like(conv[0])
    for parts in ((state, None), (None, ring), (state, ring)):
        changed = replace(pools, memory=pools.memory.clone())
        changed.store(slot, *parts)
        assert same_bits(changed.memory, written(pools, slot, *parts))
        expected = [
            given if given is not None else kept[slot] for given, kept in zip(parts, (states, conv), strict=True)
        ]
        assert all(same_bits(ours, given) for ours, given in zip(changed.load(slot), expected, strict=True))


def test_units_of_a_slot_may_lie_in_any_blocks_in_any_order() -> None:
    pools = scattered(torch.zeros(2, 4, 384), torch.zeros(2, 2, 64, 64), pieces=4, units=3, layer=2)
    order = torch.arange(pools.pages.shape[1]).flip(0).to(torch.int32)
    pools = replace(pools, pages=torch.stack([order, order]))
    blocks, within = pools.units(1)
    numbers = range(16, 24)
    assert blocks.tolist() == [7 - number // 3 for number in numbers]
    assert within.tolist() == [number % 3 for number in numbers]


def test_records_of_a_window_lie_behind_the_ring() -> None:
    cut = Cut.fewest_blocks(20, 32, 128, 6, FP32, BF16, BLOCK, window=4)
    assert (cut.R, cut.pieces, cut.records, cut.flags, cut.blocks(20)) == (6, 2, 2, 4, 99)
    assert cut.unit_bytes == cut.state_bytes + cut.ring_bytes + 2 * 3 * 128 * 4
    assert min(c.unit_bytes for c in Cut.possible(32, 128, 6, FP32, BF16, window=4)) < cut.unit_bytes
    assert {c.R for c in Cut.possible(32, 128, 6, FP32, BF16)} == {6}
