"""The scheduler's side without an engine: tables, hits, deferral, and the step that never happened."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from vllm.v1.core.block_pool import BlockPool

from kimi_vllm.cache.arena import ArenaPool
from kimi_vllm.cache.arena_check import check_arena
from kimi_vllm.cache.manager import KDAStateManager, KDAStateSpec

BLOCK = 4
STATE = 3
"""Blocks of a state."""


def make_manager(states=9, caching=True, interval=0, host=0):
    """A manager whose pool has blocks for so many states, and none for pages."""
    spec = KDAStateSpec(
        block_size=BLOCK,
        num_kv_heads=1,
        head_size=8,
        dtype=torch.float32,
        state_blocks=STATE,
        num_host_blocks=host * STATE,
        checkpoint_interval=interval,
    )
    pool = ArenaPool.like(BlockPool(1 + states * STATE, caching, BLOCK), 0, host * STATE)
    manager = KDAStateManager(spec, pool, enable_caching=caching, kv_cache_group_id=1, scheduler_block_size=BLOCK)
    manager.share(pool, SimpleNamespace(kv_cache_group_id=0, req_to_blocks=defaultdict(list)))
    return manager


def free_blocks(manager):
    return manager.block_pool._arena.get_num_free_blocks()


def check(manager):
    manager.block_pool.check(manager.req_to_blocks.values())
    check_arena(manager.block_pool._arena, [])


class Request(SimpleNamespace):
    """As much of vLLM's request as the manager looks at; tokens decide the hashes."""

    def __init__(self, request_id, tokens, junction=0):
        hashes = [repr(tokens[:end]).encode() for end in range(BLOCK, len(tokens) + 1, BLOCK)]
        super().__init__(
            request_id=request_id,
            num_prompt_tokens=len(tokens),
            num_tokens=len(tokens),
            block_hashes=hashes,
            shared_prefix_boundary=junction,
        )


def schedule(manager, request, start, end, hit=()):
    """What `KVCacheManager.allocate_slots` does to a manager for tokens start..end. False: not now."""
    name = request.request_id
    manager.remove_skipped_blocks(name, start, request.num_prompt_tokens)
    if manager.get_num_blocks_to_allocate(name, end, hit, start, start, end) > free_blocks(manager):
        return False
    if hit:
        manager.add_local_computed_blocks(name, hit, start, 0)
    elif name not in manager.num_cached_block:
        manager.add_local_computed_blocks(name, [], 0, 0)
    manager.allocate_new_blocks(name, end, end)
    if manager.enable_caching:
        manager.cache_blocks(request, end // BLOCK * BLOCK, replay_boundaries=())
    return True


def settle(manager):
    """The end of a scheduling round."""
    manager.take_new_block_ids()
    manager.new_step_starts()


def hit_of(manager, request, max_length=None):
    length = len(request.block_hashes) * BLOCK if max_length is None else max_length
    [blocks], tokens = manager.find_longest_cache_hit(
        request.block_hashes, length, [1], manager.block_pool, manager.kv_cache_spec, False, BLOCK
    )
    return blocks, tokens


def table(manager, name):
    return [block.block_id for block in manager.req_to_blocks[name]]


def test_one_step_prefill_keeps_the_last_boundary_and_runs_in_the_last_slot():
    manager = make_manager()
    request = Request("a", list(range(14)))
    assert schedule(manager, request, 0, 14)
    assert [slot > 0 for slot in table(manager, "a")] == [False, False, True, True]
    settle(manager)
    assert hit_of(manager, request)[1] == 12


def test_a_boundary_at_the_end_of_a_step_costs_no_slot():
    manager = make_manager()
    request = Request("a", list(range(20)))
    assert schedule(manager, request, 0, 8)
    used = manager.block_pool.slots.num_live
    settle(manager)
    assert used == 1
    assert hit_of(manager, request)[1] == 8


def test_only_the_latest_boundary_of_a_long_run_stays():
    manager = make_manager()
    request = Request("a", list(range(60)))
    for start in range(0, 48, BLOCK):
        assert schedule(manager, request, start, start + BLOCK)
        settle(manager)
    manager.free("a")
    assert manager.block_pool.slots.num_idle == 1
    assert hit_of(manager, request)[1] == 48


def test_a_hit_waits_for_the_step_that_writes_it():
    manager = make_manager()
    first, second = Request("a", list(range(13))), Request("b", list(range(13)))
    assert schedule(manager, first, 0, 13)
    blocks, tokens = hit_of(manager, second)
    assert tokens == 12
    assert not schedule(manager, second, 12, 13, hit=blocks)
    settle(manager)
    assert schedule(manager, second, 12, 13, hit=blocks)
    assert table(manager, "b")[2] == table(manager, "a")[2]
    assert table(manager, "b")[3] != table(manager, "a")[3]


def test_a_state_that_was_never_written_is_never_found():
    """Preempted after being scheduled, before the step ran (vLLM's priority policy does this)."""
    manager = make_manager()
    request = Request("a", list(range(13)))
    assert schedule(manager, request, 0, 13)
    manager.free("a")
    settle(manager)
    assert hit_of(manager, request) == ([], 0)
    assert manager.block_pool.slots.num_idle == 0
    assert free_blocks(manager) == 9 * STATE


def test_a_state_of_a_finished_request_is_found():
    manager = make_manager()
    request = Request("a", list(range(13)))
    assert schedule(manager, request, 0, 13)
    settle(manager)
    manager.free("a")
    assert hit_of(manager, request)[1] == 12
    check(manager)


def test_requests_wait_when_blocks_are_gone_and_running_ones_stay_where_they_are():
    manager = make_manager(states=2)
    first, second, third = (Request(name, [ord(name)] * 20) for name in "abc")
    assert schedule(manager, first, 0, 3)
    manager.req_to_blocks["b"] = []
    assert not schedule(manager, second, 0, 3), "two blocks are left for the growth of those that run"
    del manager.req_to_blocks["b"]
    slot = table(manager, "a")[0]
    settle(manager)
    assert schedule(manager, first, 3, 6)
    assert table(manager, "a") == [0, slot], "a boundary is not worth a block that somebody may need"
    assert not schedule(manager, third, 0, 3)
    manager.free("a")
    settle(manager)
    assert schedule(manager, third, 0, 3)


def test_without_caching_a_request_keeps_its_slot():
    manager = make_manager(caching=False)
    request = Request("a", list(range(40)))
    for start in range(0, 40, 2):
        assert schedule(manager, request, start, start + 2)
        settle(manager)
    assert manager.block_pool.slots.num_live == 1
    assert free_blocks(manager) == 8 * STATE


def test_release_goes_through_vllms_page_pool():
    """VLLM frees blocks of all groups through the pool of the pages, which must route ours to us."""
    manager = make_manager()
    request = Request("a", list(range(13)))
    assert schedule(manager, request, 0, 13)
    settle(manager)
    manager.block_pool._arena.free_blocks(reversed(manager.pop_blocks_for_free("a")))
    assert manager.block_pool.slots.num_live == 0
    check(manager)


def test_reset_needs_idle_slots():
    manager = make_manager()
    request = Request("a", list(range(13)))
    assert schedule(manager, request, 0, 13)
    settle(manager)
    assert not manager.block_pool.reset_prefix_cache()
    manager.free("a")
    assert manager.block_pool.reset_prefix_cache()
    assert hit_of(manager, request) == ([], 0)


@pytest.mark.parametrize("states", [2, 3, 5, 11])
def test_random_traffic_loses_no_slot(states):
    import random

    rng = random.Random(states)
    manager = make_manager(states)
    running, served = {}, 0
    for _ in range(600):
        for request, done in list(running.values()):
            end = min(done + rng.randint(1, 9), request.num_prompt_tokens)
            if rng.random() < 0.05 or done == request.num_prompt_tokens:
                manager.free(request.request_id)
                del running[request.request_id]
            elif schedule(manager, request, done, end):
                running[request.request_id] = (request, end)
        if rng.random() < 0.6:
            tokens = [rng.randint(0, 2)] * 8 + [rng.randint(0, 1) for _ in range(rng.randint(1, 24))]
            request = Request(f"r{served}", tokens)
            blocks, hit = hit_of(manager, request, max_length=len(tokens) - 1)
            if schedule(manager, request, hit, min(len(tokens), hit + rng.randint(1, 12)), hit=blocks):
                running[request.request_id] = (request, min(len(tokens), hit + 1))
                served += 1
        check(manager)
        settle(manager)
    for request, _ in running.values():
        manager.free(request.request_id)
    assert served > 50
    assert manager.block_pool.slots.num_live == 0
    check(manager)


def copies(operations):
    return [(source, target) for source, target in operations if isinstance(target, int)]


def given(operations, manager):
    """Which slots on the device get which blocks."""
    return [(slot, what) for slot, what in operations if isinstance(what, list) and slot < manager.block_pool.num_slots]


def test_an_evicted_state_goes_to_host_memory_and_comes_back_before_the_step_that_reads_it():
    manager = make_manager(states=2, host=2)
    first, second = Request("a", [1] * 5), Request("b", [2] * 5)
    assert schedule(manager, first, 0, 4)
    slot = table(manager, "a")[0]
    settle(manager)
    manager.free("a")
    for request in (second, Request("c", [3] * 5)):
        assert schedule(manager, request, 0, 4)
        settle(manager)
        manager.free(request.request_id)
    operations = manager.block_pool.take_operations()
    [(source, host_id)] = copies(operations)
    assert source == slot
    assert {slot for slot, _ in given(operations, manager)} == {1, 2}
    assert operations.index((source, host_id)) == 3, "it has a place of its own, is written, and saved before the next"
    assert manager.block_pool.take_operations() == []

    blocks, tokens = hit_of(manager, Request("d", [1] * 5))
    assert (tokens, blocks[0].block_id) == (4, host_id)
    assert schedule(manager, Request("d", [1] * 5), 4, 5, hit=blocks)
    read, write = table(manager, "d")
    moves = copies(manager.block_pool.take_operations())
    # Both slots held checkpoints: they are saved first, and the loading comes before its host slot is used again.
    assert (host_id, read) in moves
    saved = [move for move in moves if move[1] >= manager.block_pool.num_slots]
    assert {source for source, _ in saved} == {read, write}
    for position, (source, target) in enumerate(moves):
        if target == host_id:
            assert (host_id, read) in moves[:position]
        if source == read:
            assert (host_id, read) not in moves[:position]
    settle(manager)
    assert hit_of(manager, Request("e", [1] * 5))[0][0].block_id == read
    manager.free("d")
    check(manager)


def test_a_state_is_saved_before_its_blocks_are_anybody_elses():
    """Pages take the blocks of a checkpoint, and then a new state takes those of another."""
    manager = make_manager(states=2, host=2)
    for name in "ab":
        assert schedule(manager, Request(name, [ord(name)] * 5), 0, 4)
        settle(manager)
        manager.free(name)
    backing = dict(manager.block_pool.take_operations())
    arena = manager.block_pool._arena
    pages = [page.block_id for page in arena.get_new_blocks(STATE)]
    assert schedule(manager, Request("c", [3] * 5), 0, 4)
    operations = manager.block_pool.take_operations()
    saved = [source for source, _ in copies(operations)]
    assert pages == sorted(backing[saved[0]], key=pages.index), "pages lie where the first was"
    [live] = table(manager, "c")
    assert (live, backing[saved[1]]) in operations or live == saved[1]
    assert [position for position, (_, what) in enumerate(operations) if isinstance(what, int)] == [1, 3]


def test_a_hit_in_host_memory_needs_blocks_to_be_loaded_into():
    manager = make_manager(states=3, host=1)
    assert schedule(manager, Request("a", [1] * 5), 0, 4)
    settle(manager)
    manager.free("a")
    held = manager.block_pool._arena.get_new_blocks(3 * STATE)
    again = Request("b", [1] * 5)
    blocks, _ = hit_of(manager, again)
    assert manager.block_pool.is_on_host(blocks[0])
    manager.block_pool._arena.free_blocks(held[:STATE])
    assert not schedule(manager, again, 4, 5, hit=blocks), "one state is not enough for reading and writing"
    manager.block_pool._arena.free_blocks(held[STATE : 2 * STATE])
    assert schedule(manager, again, 4, 5, hit=blocks)


def test_what_a_step_needs_is_said_in_blocks():
    manager = make_manager(states=9)
    request = Request("a", list(range(13)))

    def needs(name, tokens, hit=()):
        return manager.get_num_blocks_to_allocate(name, tokens, hit, 0, 0, tokens)

    assert needs("a", 13) == STATE
    assert schedule(manager, request, 0, 13)
    settle(manager)
    assert needs("a", 13) == needs("a", 40) == 0, "it can stay where it is"
    again = Request("b", list(range(13)))
    blocks, _ = hit_of(manager, again)
    assert needs("b", 13, blocks) == STATE + 1, (
        "a state in use is read where it is; and one block for the one that runs"
    )
    manager.free("a")
    blocks, _ = hit_of(manager, again)
    assert needs("b", 13, blocks) == 2 * STATE, "an idle one is no longer there to be reclaimed"


def test_a_step_ends_in_its_own_block_however_far_a_draft_model_looks_ahead():
    """The last entry of a table is the slot that the step writes."""
    manager = make_manager()
    assert schedule(manager, Request("a", list(range(13))), 0, 2)
    settle(manager)
    manager.block_pool.touch(manager.req_to_blocks["a"])  # so it has to leave this slot in the next block

    def needs(ahead, end):
        return manager.get_num_blocks_to_allocate("a", ahead, (), 2, 2, end)

    assert (needs(BLOCK + 3, BLOCK), needs(BLOCK + 3, BLOCK + 1)) == (0, STATE)
    assert manager.allocate_new_blocks("a", BLOCK + 3, BLOCK) == []
    assert len(table(manager, "a")) == 1
    assert len(manager.allocate_new_blocks("a", 2 * BLOCK + 3, BLOCK + 1)) == 1
    assert len(table(manager, "a")) == 2


def test_one_request_needs_two_states_where_prefixes_are_cached():
    spec = make_manager().kv_cache_spec
    for caching, states in ((True, 2), (False, 1)):
        config = SimpleNamespace(cache_config=SimpleNamespace(enable_prefix_caching=caching))
        assert spec.max_memory_usage_bytes(config) == states * STATE * spec.page_size_bytes


@pytest.mark.parametrize(("local", "external"), [(0, 1), (0, 4), (0, 5), (0, 15), (4, 1), (4, 4), (4, 7)])
def test_a_loaded_state_has_a_slot_of_its_own_at_its_last_token(local, external):
    """Behind a prefix hit or at the beginning, at a boundary and between."""
    manager = make_manager(states=3)
    if local:
        first = Request("first", list(range(local)))
        assert schedule(manager, first, 0, local)
        settle(manager)
        manager.free("first")
    request = Request("a", list(range(20)))
    hit = hit_of(manager, request)[0][: local // BLOCK]
    assert len(hit) == local // BLOCK
    end = local + external
    # One state is asked for, and one that can be evicted no more.
    wanted = manager.get_num_blocks_to_allocate("a", end, hit, end, local, end)
    assert wanted == (1 + bool(local)) * STATE
    manager.add_local_computed_blocks("a", hit, local, external)
    manager.allocate_external_computed_blocks("a", local, external)
    assert manager.allocate_new_blocks("a", end, end) == []
    check(manager)
    slots = table(manager, "a")
    assert [slot > 0 for slot in slots] == [*[True] * bool(local), *[False] * (len(slots) - 1 - bool(local)), True]
    assert len(slots) == -(-end // BLOCK)
    assert manager.accessed_slots("a", end)[0] == slots[-1]
    # The request writes on in it within its block.
    assert schedule(manager, request, end, -(-end // BLOCK) * BLOCK)
    assert table(manager, "a") == [0] * (len(slots) - 1) + slots[-1:]
    manager.free("a")
    check(manager)
