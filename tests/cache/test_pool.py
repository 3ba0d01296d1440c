"""The worker's end of the memory: blocks given to slots, states copied, and whose memory it is."""

import pytest
import torch

from kimi_vllm.cache.layout import StateLayout, num_slots
from kimi_vllm.cache.pool import StatePool
from kimi_vllm.kernels.cut import Cut

LAYERS, H, D, R = 3, 2, 64, 4
CUT = Cut(H, D, R, torch.float32, torch.float32, pieces=2, block_bytes=3 * 44 * 4 * D + 16 * 34 * 4, window=2)
LAYOUT = StateLayout(CUT, LAYERS)
B = 30


def bound(num_host_blocks=0):
    """A pool, and the memory that vLLM has bound to it, NaN all over."""
    pool = StatePool(LAYOUT, LAYOUT.blocks, "cpu", num_host_blocks)
    storage = torch.full((B * CUT.block_bytes // 4,), torch.nan)
    pool.bind(storage.view(B, -1)[:, :100])  # one layer's part of each block
    return pool, storage


def random_state():
    return torch.randn(H, D, D), torch.randn(R, 3 * H * D)


def test_states_lie_in_the_memory_of_the_view():
    pool, storage = bound()
    assert pool.num_slots == num_slots(B, LAYOUT.blocks) > 3
    pool.apply([(2, list(range(7, 7 + LAYOUT.blocks)))])
    states = [random_state() for _ in range(LAYERS)]
    for layer, state in zip(pool.layers, states, strict=True):
        layer.store(2, *state)
    written = storage.view(B, -1).isfinite().any(1).nonzero().flatten().tolist()
    assert written == list(range(7, 7 + LAYOUT.blocks))
    for layer, (state, ring) in zip(pool.layers, states, strict=True):
        found = layer.load(2)
        assert torch.equal(found[0], state)
        assert torch.equal(found[1], ring)


@pytest.mark.parametrize("places", ["side by side", "backwards", "in pieces"])
def test_operations_are_done_in_their_order(places):
    pool, storage = bound(num_host_blocks=2 * LAYOUT.blocks + 3)
    P, S = LAYOUT.blocks, pool.num_slots
    low, high = list(range(1, 1 + P)), list(range(20, 20 + P))
    pool.apply([(1, low)])
    state, ring = random_state()
    pool.layers[1].store(1, state, ring)
    pool.base[1] = 77
    # Out to the host, its blocks to another slot, and back into that one's place in memory.
    on_host = [B + block for block in range(2, 2 + P)]
    if places != "side by side":
        on_host = on_host[::-1] if places == "backwards" else [*on_host[2:], *on_host[:2]]
    pool.apply([(S + 1, on_host), (1, S + 1), (3, low), (2, high), (S + 1, 2), (2, 3)])
    for slot in (2, 3):
        assert torch.equal(pool.layers[1].load(slot)[0], state)
        assert torch.equal(pool.layers[1].load(slot)[1], ring)
        assert pool.base[slot] == 77
    assert pool.pages[3, :P].tolist() == low
    # Two pages out to the host, others in their places there and here, and back elsewhere.
    blocks = storage.view(B, -1)
    blocks[8:12] = torch.arange(4.0)[:, None]
    pool.apply([([8, 9], [B, B + 1]), ([B, 10], [9, B]), ([B, B + 1], [8, 29])])
    assert [blocks[page].unique().tolist() for page in (8, 9, 10, 29)] == [[2.0], [0.0], [2.0], [1.0]]


def test_host_memory_is_the_host_s_where_vllm_builds_a_model():
    with torch.device("meta"):
        pool = StatePool(LAYOUT, LAYOUT.blocks, "cpu", LAYOUT.blocks)
    assert pool.host.device == pool._host_base.device == pool.memory.device == torch.device("cpu")


def test_clearing_touches_its_blocks_only():
    pool, storage = bound()
    pool.clear([3, 29, 7])
    blocks = storage.view(B, -1)
    assert (blocks[[3, 29, 7]] == 0).all()
    assert blocks.isnan().all(1).sum() == B - 3
    pool.clear([])


def test_what_a_slot_had_is_somebody_elses():
    pool, _ = bound()
    blocks = list(range(5, 5 + LAYOUT.blocks))
    pool.apply([(1, blocks), (2, [block + LAYOUT.blocks for block in blocks]), (3, blocks)])
    assert pool.pages[3].tolist() == blocks
    pool.layers[0].store(3, torch.ones(H, D, D))
    assert torch.equal(pool.layers[0].load(1)[0], torch.ones(H, D, D))  # nobody asks for it any more


def test_memory_with_layers_apart_is_refused():
    pool = StatePool(LAYOUT, LAYOUT.blocks, "cpu")
    with pytest.raises(ValueError, match="side by side"):
        pool.bind(torch.zeros(B, CUT.block_bytes // 4 - 4))


def test_memory_is_let_go_after_profiling():
    pool, storage = bound()
    before = [layer.memory.data_ptr() for layer in pool.layers]
    pool.release()
    assert pool.num_slots == 1
    assert all(
        layer.memory.untyped_storage().data_ptr() != storage.untyped_storage().data_ptr() for layer in pool.layers
    )
    pool.bind(storage.view(B, -1))
    assert [layer.memory.data_ptr() for layer in pool.layers] == before


def test_a_stage_with_smaller_states_has_the_same_table():
    pool = StatePool(LAYOUT, LAYOUT.blocks + 2, "cpu")
    pool.bind(torch.zeros(B, CUT.block_bytes // 4))
    pool.apply([(1, list(range(1, LAYOUT.blocks + 3))), (2, list(range(10, LAYOUT.blocks + 12)))])
    pool.layers[2].store(1, *random_state())
    pool.apply([(1, 2)])
    assert torch.equal(pool.layers[2].load(1)[0], pool.layers[2].load(2)[0])
