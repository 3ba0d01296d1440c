"""One pool of blocks: what vLLM asks of it, what is reclaimed first, and random histories."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.arena import BLOCK, STATE, Request, Traffic
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from vllm.v1.core.block_pool import BlockPool

from kimi_vllm.cache.arena import ArenaPool, Kind
from kimi_vllm.cache.manager import KDAStateManager, KDAStateSpec


def test_pages_are_kept_with_the_state_that_needs_them_and_loose_without():
    traffic = Traffic(30)
    kept, loose = traffic.start([1] * 8), traffic.start([2] * 8, publish=False)
    assert traffic.kind([1] * 8) == traffic.kind([2] * 8) == [Kind.PAGE] * 2
    traffic.finish(kept)
    traffic.finish(loose)
    assert traffic.kind([1] * 8) == [Kind.KEPT] * 2
    assert traffic.kind([2] * 8) == [Kind.LOOSE] * 2
    traffic.slots.withdraw_slots([traffic.slots.slots.find(Request([1] * 8).block_hashes[-1])])
    traffic.check()
    assert traffic.kind([1] * 8) == [Kind.LOOSE] * 2
    assert traffic.arena.counts() == {"clean": 20, "loose": 4, "kept": 0, "state": 6, "page": 0}


def test_blocks_are_reclaimed_from_slots_that_hold_nothing_then_pages_then_states():
    traffic = Traffic(15)
    for tokens, publish in (([1] * 8, True), ([2] * 8, False)):
        traffic.finish(traffic.start(tokens, publish))
    arena = traffic.arena
    # 5 clean, a spare slot, 2 loose pages, and a state with 2 pages that only it needs.
    assert arena.counts() == {"clean": 5, "loose": 2, "kept": 2, "state": 6, "page": 0}
    taken = arena.get_new_blocks(8)
    assert (traffic.slots.slots.num_spare, arena.page_evictions) == (0, 0)
    taken += arena.get_new_blocks(2)
    assert (traffic.slots.slots.num_idle, arena.page_evictions) == (1, 2)
    assert traffic.kind([2] * 8) == [None] * 2
    assert traffic.kind([1] * 8) == [Kind.KEPT] * 2
    taken += arena.get_new_blocks(4)
    assert traffic.kind([1] * 8) == [Kind.LOOSE, None], "the last page of the state goes with it"
    assert traffic.slots.counts == {"evictions": 1, "value_lost": 2}
    assert arena.get_num_free_blocks() == 1
    with pytest.raises(ValueError, match="Cannot get 2 free blocks"):
        arena.get_new_blocks(2)
    arena.free_blocks(taken)
    traffic.check()


def test_the_state_that_saves_least_for_its_blocks_goes_first():
    """Eight blocks for 3 + 8, one block for 3 + 1; and four more for 3 + 4, which two share with the longer one."""
    traffic = Traffic(60)
    for tokens in ([1] * 32, [2] * 4, [1] * 16 + [3] * 16):
        traffic.finish(traffic.start(tokens))
    slots = traffic.slots.slots
    worth = {len(slots.origin(slot)[0]): slots.worth(slot) for slot in slots.slots() if slots.origin(slot)[1] == 1}
    assert worth == {1: 1 / 4}
    both = [slots.worth(slot) for slot in slots.slots() if slots.origin(slot)[1] == 8]
    assert both == [8 / (3 + 4)] * 2, "the four blocks that they share stay if one goes"
    traffic.slots.evict()
    assert traffic.kind([2] * 4) == [Kind.LOOSE]
    traffic.slots.evict()
    [left] = [slots.worth(slot) for slot in slots.slots()]
    assert left == 8 / (3 + 8)
    traffic.check()


def test_pages_of_a_state_on_the_host_stay_and_go_with_it():
    traffic = Traffic(12, host=STATE)
    traffic.finish(traffic.start([1] * 8))
    assert traffic.slots.evict()
    traffic.check()
    assert traffic.kind([1] * 8) == [Kind.KEPT] * 2
    held = traffic.arena.get_new_blocks(10)
    assert traffic.kind([1] * 8) == [Kind.KEPT] * 2
    held += traffic.arena.get_new_blocks(1)
    assert traffic.slots.host.num_idle == 0
    assert traffic.slots.host.value_lost == 2
    traffic.arena.free_blocks(held)
    traffic.check()


def test_a_state_that_is_loaded_finds_its_pages():
    traffic = Traffic(20, host=2 * STATE)
    traffic.finish(traffic.start([1] * 8))
    traffic.slots.evict()
    again = traffic.start([1] * 8 + [2] * 4)
    assert traffic.slots.counts["swaps_in"] == 1
    assert len(again.states) == 2
    traffic.check()
    traffic.finish(again)
    assert traffic.kind([1] * 8 + [2] * 4) == [Kind.KEPT] * 3
    traffic.check()


def test_pages_follow_their_state_to_the_host_and_come_back_with_it():
    traffic = Traffic(20, host=STATE + 3)
    arena, counts = traffic.arena, traffic.slots.counts
    traffic.finish(traffic.start([1] * 12))
    where = [page.block_id for page in traffic.pages([1] * 12)]
    held = arena.get_new_blocks(19)
    traffic.check(held)
    assert counts == {"evictions": 1, "swaps_out": 1, "page_swaps_out": 2}
    assert traffic.kind([1] * 12) == [Kind.KEPT, Kind.SPILLED, Kind.SPILLED]
    held += arena.get_new_blocks(1)
    assert traffic.kind([1] * 12) == [Kind.SPILLED] * 3
    assert (arena.host_counts()["page"], arena.page_evictions) == (3, 0)
    spilled = [page.block_id for page in traffic.pages([1] * 12)]
    moves = [move for move in traffic.slots.take_operations() if isinstance(move[0], list)]
    assert moves == [([one], [other]) for one, other in zip(where[::-1], spilled[::-1], strict=True)]

    arena.free_blocks(held)
    arena.take_new_pages()
    again = traffic.start([1] * 12 + [2] * 4)
    traffic.check()
    assert counts["page_swaps_in"] == 3
    assert arena.host_counts()["page"] == 0
    *_, state, first, second, third, _ = traffic.slots.take_operations()
    assert state[1] == again.states[0].block_id, "the state first, for it must not be evicted"
    assert [first, second, third] == [
        ([one], [page.block_id]) for one, page in zip(spilled, again.pages[:3], strict=True)
    ]
    assert arena.take_new_pages() == [again.pages[3].block_id], "what was loaded is not cleared"
    assert not [event for event in arena.take_events() if isinstance(event, BlockRemoved)]


def test_a_block_that_is_loaded_is_not_cleared_for_whoever_had_it_in_the_same_step():
    traffic = Traffic(20, host=STATE + 2)
    traffic.finish(traffic.start([1] * 8))
    traffic.arena.free_blocks(traffic.arena.get_new_blocks(20))  # a request that is preempted before the step is sent
    again = traffic.start([1] * 8)
    assert traffic.slots.counts["page_swaps_in"] == 2
    assert not {page.block_id for page in again.pages} & {*traffic.arena.take_new_pages()}


def test_what_comes_back_leaves_its_place_to_what_it_pushes_out():
    """Memory for one prompt here and one there: they change places, and nothing is lost."""
    traffic = Traffic(STATE * 2 + 12, host=STATE * 2 + 12)
    for _ in range(4):
        for token in (1, 2):
            request = traffic.start([token] * 48)
            assert request is not None
            traffic.check()
            traffic.finish(request)
    assert traffic.slots.host.value_lost == traffic.arena.page_evictions == 0
    assert traffic.slots.counts["page_swaps_in"] > 40


def test_the_state_of_a_hit_is_not_given_up_for_its_pages():
    host = STATE + 2
    spec = KDAStateSpec(
        block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32, state_blocks=STATE, num_host_blocks=host
    )
    arena, tables = ArenaPool.like(BlockPool(21, True, BLOCK), 0, host), {"again": []}
    manager = KDAStateManager(spec, arena, enable_caching=True, kv_cache_group_id=1, scheduler_block_size=BLOCK)
    manager.share(arena, SimpleNamespace(kv_cache_group_id=0, req_to_blocks=tables))
    traffic = Traffic(0, parts=(arena, manager.block_pool))
    traffic.finish(traffic.start([1] * 8))
    arena.free_blocks(arena.get_new_blocks(20))
    assert arena.host_counts() == {"clean": 0, "state": 3, "page": 2}
    traffic.finish(traffic.start([2] * 40))
    arena.get_new_blocks(arena.counts()["clean"])
    tables["again"] += traffic.pages([1] * 8)
    arena.touch(tables["again"])
    key = Request([1] * 8).block_hashes[-1]
    [state] = manager.block_pool.get_cached_block(key, [1])
    assert manager.block_pool.is_on_host(state)
    manager.add_local_computed_blocks("again", [manager.block_pool.null_block, state], 8, 0)
    assert manager.block_pool.slots.find(key) == manager.req_to_blocks["again"][-1].block_id
    assert all(page.block_id < arena.num_gpu_blocks for page in tables["again"])


def test_a_full_host_gives_up_the_state_that_saves_least_and_its_pages():
    traffic = Traffic(20, host=2 * STATE + 3)
    for tokens in ([1] * 8, [2] * 4):
        traffic.finish(traffic.start(tokens))
    held = traffic.arena.get_new_blocks(20)
    assert traffic.arena.host_counts()["page"] == 3
    traffic.arena.free_blocks(held)
    traffic.finish(traffic.start([3] * 12))
    held = traffic.arena.get_new_blocks(20)
    assert traffic.kind([2] * 4) == [None], "a block for 3 + 1"
    assert traffic.kind([1] * 8) == [None] * 2, "two for 3 + 2"
    assert traffic.kind([3] * 12) == [Kind.SPILLED] * 3
    assert traffic.slots.host.value_lost == 3
    removed = [event for event in traffic.arena.take_events() if isinstance(event, BlockRemoved)]
    assert sum(len(event.block_hashes) for event in removed) == 3
    traffic.check(held)


def test_a_page_that_is_computed_again_is_kept_instead_of_the_spilled_one():
    traffic = Traffic(20, host=STATE + 2)
    traffic.finish(traffic.start([1] * 8))
    traffic.arena.free_blocks(traffic.arena.get_new_blocks(20))
    assert traffic.kind([1] * 8) == [Kind.SPILLED] * 2
    other = traffic.start([1] * 8, cold=True)
    traffic.check()
    assert traffic.kind([1] * 8) == [Kind.PAGE] * 2, "what is on the device is found first"
    traffic.finish(other)
    traffic.check()
    assert traffic.arena.host_counts()["page"] == 0
    assert traffic.kind([1] * 8) == [Kind.KEPT] * 2


def test_a_spilled_page_is_taken_out_of_the_cache():
    traffic = Traffic(20, host=STATE + 2)
    traffic.finish(traffic.start([1] * 8))
    traffic.arena.free_blocks(traffic.arena.get_new_blocks(20))
    traffic.arena.evict_blocks({page.block_id for page in traffic.pages([1] * 8)})
    traffic.check()
    assert traffic.kind([1] * 8) == [None] * 2
    traffic.finish(traffic.start([2] * 8))
    traffic.arena.free_blocks(traffic.arena.get_new_blocks(20))
    assert traffic.arena.reset_prefix_cache()
    assert traffic.slots.reset_prefix_cache()
    traffic.check()
    assert traffic.arena.host_counts()["page"] == 0


def copies(traffic):
    """Two requests that compute the same prompt at once, so that every page is there twice."""
    one, two = traffic.start([1] * 8, publish=False), traffic.start([1] * 8)
    traffic.check()
    return one, two


@pytest.mark.parametrize("first", [0, 1])
def test_of_two_copies_of_a_page_one_is_kept(first):
    traffic = Traffic(30)
    both = copies(traffic)
    traffic.finish(both[first])
    traffic.check()
    assert traffic.arena.counts()["loose"] == 2
    traffic.finish(both[1 - first])
    traffic.check()
    assert (traffic.arena.counts()["loose"], traffic.arena.counts()["kept"]) == (2, 2)
    traffic.arena.get_new_blocks(traffic.arena.free_block_queue.num_free_blocks + STATE + 2)
    assert traffic.kind([1] * 8) == [Kind.KEPT] * 2, "a copy goes before a state"


def test_where_a_copy_is_taken_out_of_the_cache_another_is_kept():
    traffic = Traffic(30)
    one, two = copies(traffic)
    traffic.finish(one)
    traffic.arena.evict_blocks({page.block_id for page in two.pages})
    traffic.check()
    assert traffic.kind([1] * 8) == [Kind.KEPT] * 2
    # The state is in use, and the request that uses it has pages of its own: these can go all the same.
    traffic.arena.get_new_blocks(traffic.arena.get_num_free_blocks())
    assert traffic.kind([1] * 8) == [None] * 2


def test_pages_taken_out_of_the_cache_are_clean():
    traffic = Traffic(30)
    traffic.finish(traffic.start([1] * 8))
    traffic.finish(traffic.start([2] * 8, publish=False))
    pages = {page.block_id for page in traffic.arena.blocks if page.block_hash is not None}
    traffic.arena.evict_blocks(pages)
    traffic.check()
    assert traffic.arena.counts()["clean"] == 30 - 2 * STATE


def test_reset_forgets_pages_unless_somebody_has_blocks():
    traffic = Traffic(30)
    traffic.finish(traffic.start([1] * 8))
    running = traffic.start([2] * 8)
    assert not traffic.arena.reset_prefix_cache()
    traffic.check()
    traffic.finish(running)
    assert traffic.arena.reset_prefix_cache()
    assert traffic.slots.reset_prefix_cache()
    traffic.check()
    assert traffic.arena.counts() == {"clean": 24, "loose": 0, "kept": 0, "state": 6, "page": 0}
    assert isinstance(traffic.arena.take_events()[-1], AllBlocksCleared)


def test_events_tell_of_pages_as_vllms_do_and_never_of_states():
    traffic = Traffic(12)
    traffic.finish(traffic.start([1] * 8))
    traffic.arena.free_blocks(traffic.arena.get_new_blocks(12))
    stored, *removed = traffic.arena.take_events()
    assert isinstance(stored, BlockStored)
    assert all(isinstance(event, BlockRemoved) for event in removed)
    assert sorted(stored.block_hashes) == sorted(key for event in removed for key in event.block_hashes)


def test_without_prefix_caching_there_are_clean_blocks_pages_and_states():
    traffic = Traffic(12, caching=False)
    request = Request([])
    request.pages, request.states = traffic.arena.get_new_blocks(4), [traffic.slots.take()]
    traffic.running.append(request)
    traffic.check()
    traffic.finish(request)
    traffic.check()
    assert traffic.arena.counts() == {"clean": 9, "loose": 0, "kept": 0, "state": 3, "page": 0}


def test_a_pool_has_the_options_of_the_one_it_stands_for():
    pool = BlockPool(7, True, 32, enable_kv_cache_events=True)
    arena = ArenaPool.like(pool, 3)
    names = ("num_gpu_blocks", "enable_caching", "hash_block_size", "enable_kv_cache_events", "medium")
    assert all(getattr(arena, name) == getattr(pool, name) for name in names)
    assert all(block.pool is arena for block in arena.blocks)


texts = st.lists(st.integers(0, 1), min_size=1, max_size=6)
acts = st.sampled_from(
    ["start", "start", "start", "plain", "finish", "finish", "evict", "pages", "withdraw", "reset", "uncache"]
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    size=st.integers(10, 40),
    host=st.sampled_from([0, 0, STATE, STATE + 2, 3 * STATE + 7]),
    eviction=st.sampled_from(["value", "lru"]),
    history=st.lists(st.tuples(acts, texts, st.integers(0, 30)), min_size=5, max_size=40),
)
def test_random_histories_lose_no_block(size, host, eviction, history):
    traffic = Traffic(size, host=host, eviction=eviction)
    arena, slots = traffic.arena, traffic.slots
    for act, text, number in history:
        if act in ("start", "plain"):
            traffic.start([token for token in text for _ in range(BLOCK)], publish=act == "start")
        elif act == "finish" and traffic.running:
            traffic.finish(traffic.running[number % len(traffic.running)])
        elif act == "evict":
            slots.evict()
        elif act == "pages":
            arena.free_blocks(arena.get_new_blocks(number % (arena.get_num_free_blocks() + 1)))
        elif act == "withdraw":
            slots.withdraw_slots([1 + number % (slots.num_slots + host // STATE - 1)])
        elif act == "uncache":
            arena.evict_blocks({1 + number % size, 1 + (number + len(text)) % (size + host)})
        elif act == "reset" and not number % 5:
            assert arena.reset_prefix_cache() == slots.reset_prefix_cache() == (not traffic.running)
        traffic.check()
        assert arena.get_num_free_blocks() <= size
    for request in list(traffic.running):
        traffic.finish(request)
    traffic.check()
    assert len(arena.get_new_blocks(size)) == size, "all that counts as free can be had"
