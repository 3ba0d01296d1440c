"""What a scheduling step costs an old server: thousands of states on the host, a million tokens in a prompt.

Each row is one thing that steps do, alone, on the real classes. None should grow with what was served before.
"""

from collections.abc import Callable, Iterator
from time import perf_counter_ns
from types import SimpleNamespace
from typing import Any

import torch
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.metrics.stats import PrefixCacheStats

from kimi_vllm.cache.arena import ArenaPool
from kimi_vllm.cache.host_tier import HostTier
from kimi_vllm.cache.manager import KDAStateManager, KDAStateSpec
from serve.bench.cache.overhead import Overhead, quantiles
from serve.bench.cache.replay import Memory, make_request, our_scheduler
from serve.bench.cache.traces import BLOCK

STATES = 12_000
LONG = 2**20
SYSTEM_PROMPT = 64
"""Blocks that all prompts on the host begin with; the state at its end is on the device."""


def age_rows(repeats: int = 50) -> Iterator[Overhead]:
    """Statistics, an eviction, and what a prompt of a million tokens asks of the cache."""
    for what, case, act in (
        ("statistics", f"{LONG // BLOCK} hit lengths seen", _statistics()),
        ("eviction to the host", f"{STATES} states there", _eviction()),
        ("decode past a boundary", "1M tokens, interval 64", _boundary()),
        ("look-up of a waiting prompt", "1M tokens, nothing kept", _look_up()),
        ("state of a prompt's end", "1M tokens, nothing kept", _publication()),
    ):
        times = []
        for number in range(repeats):
            timed = act(number)
            start = perf_counter_ns()
            timed()
            times.append((perf_counter_ns() - start) / 1e3)
        yield Overhead(what, case, *quantiles(times), limit_us=200)


Prepared = Callable[[int], Callable[[], Any]]


def _statistics() -> Prepared:
    scheduler = our_scheduler(Memory(4, 1400))
    request = make_request(scheduler, "a", [3] * 64, 2)
    scheduler.log_stats = scheduler.kv_cache_manager.log_stats = True
    scheduler.kv_cache_manager.prefix_cache_stats = PrefixCacheStats()
    for hit in range(0, LONG, BLOCK):
        scheduler._count_hit(request, hit)
    scheduler.make_stats()
    return lambda number: scheduler.make_stats


def _eviction() -> Prepared:
    tier = HostTier(STATES, 1, ArenaPool.like(BlockPool(1, True, BLOCK), 0, STATES))
    for number in range(STATES):
        tier.store(_keys(number, 256, SYSTEM_PROMPT), 65 + number % 192)

    def next_state(number: int) -> Callable[[], Any]:
        keys = _keys(-1 - number, 256, SYSTEM_PROMPT)
        return lambda: tier.store(keys, 250)

    return next_state


def _boundary() -> Prepared:
    manager = _manager(interval=64)
    keys = _keys(0, 2 * LONG // BLOCK)
    request: Any = SimpleNamespace(
        request_id="a", num_prompt_tokens=LONG, num_tokens=LONG, block_hashes=keys, shared_prefix_boundary=0
    )
    manager.req_to_blocks["a"] = [manager.block_pool.null_block] * (LONG // BLOCK)
    manager.num_cached_block["a"] = LONG // BLOCK

    def next_block(number: int) -> Callable[[], Any]:
        tokens = LONG + (number + 1) * BLOCK
        manager.remove_skipped_blocks("a", tokens - BLOCK, LONG)
        manager.allocate_new_blocks("a", tokens, tokens)
        return lambda: manager.cache_blocks(request, tokens, replay_boundaries=())

    return next_block


def _look_up() -> Prepared:
    manager, keys = _manager(), _keys(0, LONG // BLOCK)
    pool: Any = manager.block_pool
    spec: Any = manager.kv_cache_spec
    return lambda number: lambda: manager.find_longest_cache_hit(keys, LONG, [1], pool, spec, False, BLOCK)


def _publication() -> Prepared:
    manager, keys = _manager(), [_keys(number, LONG // BLOCK) for number in range(2)]
    slots = manager.block_pool.slots

    def next_prompt(number: int) -> Callable[[], Any]:
        slot, _ = slots.take()
        for held in slots.slots():
            slots.withdraw(held)
        return lambda: slots.publish(slot, keys[number % 2], LONG // BLOCK)

    return next_prompt


def _manager(interval: int = 0) -> KDAStateManager:
    spec = KDAStateSpec(
        block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32, state_blocks=1, checkpoint_interval=interval
    )
    arena = ArenaPool.like(BlockPool(200, True, BLOCK), page_group=0)
    manager = KDAStateManager(spec, arena, enable_caching=True, kv_cache_group_id=1, scheduler_block_size=BLOCK)
    pages: Any = SimpleNamespace(kv_cache_group_id=0, req_to_blocks={})
    manager.share(arena, pages)
    return manager


def _keys(name: int, length: int, shared: int = 0) -> list[Any]:
    return [f"{name if index >= shared else 'shared'} {index}".encode() for index in range(length)]
