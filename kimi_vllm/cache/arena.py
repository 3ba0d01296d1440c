"""One pool of blocks for pages and states: vLLM's `BlockPool`, of which a slot has `state_blocks` blocks anywhere.

Every block but the null block is exactly one of

    clean   holds nothing; in vLLM's own free queue
    loose   a cached page that nobody uses and no kept state needs; oldest first
    kept    a cached page that nobody uses, but with which alone a kept state can be resumed
    page    referenced by requests
    state   one of the blocks of a slot

All but pages and the states in use count as free, for all of it can be made clean: slots that hold nothing first, then
loose pages, then kept states in the order of their `EvictionQueue`, each with the pages that only it needs. With host
memory all kept states go there first, and their pages follow, those that were kept first before others.

Blocks in host memory have ids behind these. They are clean, a host slot's, or *spilled*: a page that a kept state
needs, and that gave up its place on the device. vLLM finds it by its hash like any other, and it gets a block again
when a request begins with it.
"""

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum
from inspect import signature
from typing import Any, Protocol, Self

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    FreeKVCacheBlockQueue,
    KVCacheBlock,
    get_block_hash,
    make_block_hash_with_group_id,
)

from kimi_vllm.cache.prefixes import Lineage


class Kind(IntEnum):
    """What a block is; the null block counts as a page."""

    PAGE = 0
    CLEAN = 1
    LOOSE = 2
    KEPT = 3
    STATE = 4
    SPILLED = 5


class States(Protocol):
    """The slots, as the pool of their blocks sees them."""

    state_blocks: int

    @property
    def num_reclaimable(self) -> int:
        """Slots that give up their blocks when asked."""

    @property
    def backing(self) -> dict[int, list[int]]:
        """The blocks of every slot that has any."""

    def drop_spare(self) -> bool:
        """Give back the blocks of a slot that holds nothing; False if there is none."""

    @property
    def host_backing(self) -> dict[int, list[int]]:
        """The blocks of every host slot that has any."""

    def evict(self) -> bool:
        """Make the least valuable kept state a slot that holds nothing; False if there is none."""

    def evict_from_host(self) -> bool:
        """Forget the least valuable state in host memory, and so the pages it needs; False if there is none."""

    def move_page(self, source: int, target: int) -> None:
        """Have a page copied from one block to another before the next step, in order with what is done to slots."""

    def covered(self) -> Iterator[Any]:
        """Keys of the pages that kept states need, once for the device and once for the host."""


class ArenaPool(BlockPool):
    """vLLM's pool, that shares its blocks with states, and has blocks in host memory behind them.

    Of several cached copies of a page that a kept state needs, one is kept, spilled or in use; the others are loose.

    Args:
        num_host_blocks: Blocks in host memory.
        args, options: `BlockPool`'s.

    Attributes:
        states: The slots; set before the first request.
        page_group: Index of the cache group whose pages these are; likewise.
        page_evictions: Cached pages on the device that were lost for others' sake.
    """

    states: States
    page_group: int

    def __init__(self, *args: Any, num_host_blocks: int = 0, **options: Any) -> None:
        super().__init__(*args, **options)
        every = self.num_gpu_blocks + num_host_blocks
        self.blocks += [KVCacheBlock(block_id, pool=self) for block_id in range(self.num_gpu_blocks, every)]
        self._host = list(range(every - 1, self.num_gpu_blocks - 1, -1))
        self._kinds = bytearray([Kind.CLEAN]) * every
        self._kinds[self.null_block.block_id] = Kind.PAGE
        self._loose, self._kept = FreeKVCacheBlockQueue([]), FreeKVCacheBlockQueue([])
        self._needed: Counter[Any] = Counter()
        # What `cover` was told, until somebody must know.
        self._told: deque[tuple[int, Lineage, int, int]] = deque()
        self._given: list[int] = []
        self.page_evictions = 0

    @classmethod
    def like(cls, pool: BlockPool, page_group: int, num_host_blocks: int = 0) -> Self:
        """A fresh pool with the options of another, which this release of vLLM keeps under their names."""
        names = [name for name in signature(BlockPool.__init__).parameters if name != "self"]
        arena = cls(**{name: getattr(pool, name) for name in names}, num_host_blocks=num_host_blocks)
        arena.page_group = page_group
        return arena

    # What vLLM calls.

    def get_num_free_blocks(self) -> int:
        """Blocks that a request could get, whatever they hold now."""
        idle = self.free_block_queue.num_free_blocks + self._loose.num_free_blocks + self._kept.num_free_blocks
        return int(idle + self.states.num_reclaimable * self.states.state_blocks)

    def get_new_blocks(self, num_blocks: int) -> list[KVCacheBlock]:
        """Blocks with one reference each, made clean if need be."""
        if num_blocks > self.get_num_free_blocks():
            raise ValueError(f"Cannot get {num_blocks} free blocks from the pool")
        if num_blocks > self.free_block_queue.num_free_blocks:
            self._make_clean(num_blocks)
        kinds = self._kinds
        blocks: list[KVCacheBlock] = super().get_new_blocks(num_blocks)
        for block in blocks:
            kinds[block.block_id] = Kind.PAGE
            self._given.append(block.block_id)
        return blocks

    def get_cached_block(self, block_hash: BlockHash, kv_cache_group_ids: list[int]) -> list[KVCacheBlock] | None:
        """The cached page of each group, on the device if it is there too; None if one is not cached."""
        found: list[KVCacheBlock] | None = super().get_cached_block(block_hash, kv_cache_group_ids)
        if found is not None and any(block.block_id >= self.num_gpu_blocks for block in found):
            return [min(self._copies(block.block_hash), key=lambda copy: copy.block_id) for block in found]
        return found

    def touch(self, blocks: Sequence[KVCacheBlock]) -> None:
        """Add a reference to each cached page. Spilled ones have one until `load_pages`, which is next."""
        for block in blocks:
            if block.is_null:
                continue
            if block.ref_cnt == 0:
                if self._kinds[block.block_id] != Kind.SPILLED:
                    self._queue(block).remove(block)
                self._kinds[block.block_id] = Kind.PAGE
            block.ref_cnt += 1
            if self.metrics_collector:
                self.metrics_collector.on_block_accessed(block)

    def free_blocks(self, ordered_blocks: Iterable[KVCacheBlock]) -> None:
        """Drop a reference of each block, the first to be reclaimed first; slots among them go to their own pool."""
        clean: list[KVCacheBlock] = []
        slots: list[KVCacheBlock] = []
        for block in ordered_blocks:
            if block.pool is not self:
                slots.append(block)
            elif not block.is_null:
                block.ref_cnt -= 1
                if block.ref_cnt:
                    continue
                if block.block_hash is None or not self.enable_caching:
                    self._kinds[block.block_id] = Kind.CLEAN
                    clean.append(block)
                else:
                    self._park(block)
        self.free_block_queue.prepend_n(clean)
        if slots:
            slots[0].pool.free_blocks(slots)

    def evict_blocks(self, block_ids: set[int]) -> None:
        """Take pages out of the cache; those that nobody uses become clean."""
        self._settle()
        for block_id in block_ids:
            block = self.blocks[block_id]
            key = block.block_hash
            super().evict_blocks({block_id})
            if self._kinds[block_id] in (Kind.LOOSE, Kind.KEPT):
                self._move(block, Kind.CLEAN)
            elif self._kinds[block_id] == Kind.SPILLED:
                self.give_host([block_id])
            if key is not None and get_block_hash(key) in self._needed:
                copies = self._copies(key)
                if copies and not any(self._holds(copy) for copy in copies):
                    self._move(copies[0], Kind.KEPT)

    def reset_prefix_cache(self) -> bool:
        """Forget every page. False, and nothing changed, while requests have blocks."""
        if not super().reset_prefix_cache():
            return False
        for queue in (self._loose, self._kept):
            for block in queue.get_all_free_blocks():
                self._move(block, Kind.CLEAN)
        self.give_host([block_id for block_id, kind in enumerate(self._kinds) if kind == Kind.SPILLED])
        return True

    # What the scheduler calls.

    def take_new_pages(self) -> list[int]:
        """Blocks handed out since the last call that are pages now, once each."""
        given, self._given = self._given, []
        return [block_id for block_id in dict.fromkeys(given) if self._kinds[block_id] == Kind.PAGE]

    # What the slots call.

    @property
    def num_worthless(self) -> int:
        """Blocks that can be had without losing a kept state, beside those of slots that hold nothing."""
        self._settle()
        return int(self.free_block_queue.num_free_blocks + self._loose.num_free_blocks)

    def take_state(self) -> list[int]:
        """Blocks for a slot that has none."""
        ids = [block.block_id for block in self.get_new_blocks(self.states.state_blocks)]
        for block_id in ids:
            self._kinds[block_id] = Kind.STATE
        return ids

    def give_state(self, ids: Iterable[int]) -> None:
        """Take back the blocks of a slot that holds nothing."""
        self.free_blocks([self.blocks[block_id] for block_id in ids])

    def take_host(self, count: int) -> list[int] | None:
        """So many blocks in host memory for a host slot; None if there are fewer."""
        if len(self._host) < count:
            return None
        ids = [self._host.pop() for _ in range(count)]
        for block_id in ids:
            self._kinds[block_id] = Kind.STATE
        return ids

    def give_host(self, ids: Sequence[int]) -> None:
        """Take back blocks in host memory, to be handed out in this order: those of a slot stay side by side."""
        for block_id in reversed(ids):
            self._kinds[block_id] = Kind.CLEAN
            self._host.append(block_id)

    def load_pages(self, table: list[KVCacheBlock]) -> None:
        """Put blocks on the device in the place of a table's spilled pages, which were touched."""
        spilled = [index for index, block in enumerate(table) if block.block_id >= self.num_gpu_blocks]
        if not spilled:
            return
        loaded: set[int] = set()
        for index in spilled:
            # One by one: each leaves a place in host memory for what the next one pushes out.
            [block] = self.get_new_blocks(1)
            loaded.add(block.block_id)
            page, table[index] = table[index], block
            page.ref_cnt = 0
            self.move_block_hashes(page, block)
            self.states.move_page(page.block_id, block.block_id)
            self.give_host([page.block_id])
        # They are not to be cleared, though one may have been handed out before in this very step.
        self._given = [block_id for block_id in self._given if block_id not in loaded]

    def cover(self, change: int, lineage: Lineage, start: int, stop: int) -> None:
        """Pages of a lineage are needed by a kept state from now on (`change` 1), or not any more (-1)."""
        self._told.append((change, lineage, start, stop))

    def counts(self) -> dict[str, int]:
        """How many blocks there are of each kind."""
        self._settle()
        queues = {"clean": self.free_block_queue, "loose": self._loose, "kept": self._kept}
        counts = {name: int(queue.num_free_blocks) for name, queue in queues.items()}
        counts["state"] = len(self.states.backing) * self.states.state_blocks
        return counts | {"page": self.num_gpu_blocks - 1 - sum(counts.values())}

    def host_counts(self) -> dict[str, int]:
        """How many blocks in host memory there are of each kind."""
        self._settle()
        counts = {"clean": len(self._host), "state": len(self.states.host_backing) * self.states.state_blocks}
        return counts | {"page": len(self.blocks) - self.num_gpu_blocks - sum(counts.values())}

    # Inside.

    def _queue(self, block: KVCacheBlock) -> FreeKVCacheBlockQueue:
        return (self.free_block_queue, self._loose, self._kept)[self._kinds[block.block_id] - 1]

    def _move(self, block: KVCacheBlock, kind: Kind) -> None:
        """Put a page that nobody uses where it is reclaimed next among its like."""
        self._queue(block).remove(block)
        self._kinds[block.block_id] = kind
        self._queue(block).prepend_n([block])

    def _copies(self, key: Any) -> list[KVCacheBlock]:
        found = self.cached_block_hash_to_block._cache.get(key)
        return [] if found is None else list(found.values()) if isinstance(found, dict) else [found]

    def _holds(self, block: KVCacheBlock) -> bool:
        return self._kinds[block.block_id] in (Kind.PAGE, Kind.KEPT, Kind.SPILLED)

    def _park(self, block: KVCacheBlock) -> None:
        if self._told:
            self._settle()
        kind, queue = Kind.LOOSE, self._loose
        if get_block_hash(block.block_hash) in self._needed:
            for copy in self._copies(block.block_hash):
                if self._kinds[copy.block_id] == Kind.SPILLED:
                    self._lose(copy)
            copies = self._copies(block.block_hash)
            if len(copies) < 2 or not any(copy is not block and self._holds(copy) for copy in copies):
                kind, queue = Kind.KEPT, self._kept
        self._kinds[block.block_id] = kind
        queue.append(block)

    def _settle(self) -> None:
        """Do what `cover` was told, in order. States come and go more often than the pages that they need are free."""
        needed = self._needed
        while self._told:
            change, lineage, start, stop = self._told.popleft()
            if change > 0:
                needed.update(lineage[start:stop])
                continue
            for key in lineage[start:stop]:
                needed[key] -= 1
                if needed[key]:
                    continue
                del needed[key]
                for block in self._copies(make_block_hash_with_group_id(key, self.page_group)):
                    if self._kinds[block.block_id] == Kind.KEPT:
                        self._move(block, Kind.LOOSE)
                    elif self._kinds[block.block_id] == Kind.SPILLED:
                        self._lose(block)

    def _make_clean(self, count: int) -> None:
        self._settle()
        while self.free_block_queue.num_free_blocks < count:
            if self.states.drop_spare():
                continue
            if self._loose.num_free_blocks:
                self._evict_page(self._loose)
            elif not self.states.evict() and not self._spill() and not self.states.evict_from_host():
                # Needed by states in use alone, whose requests have lost their own copies from the cache.
                self._evict_page(self._kept)
            self._settle()

    def _spill(self) -> bool:
        """Move the kept page that is next to host memory; False if there is none, or no room."""
        if not self._host or not self._kept.num_free_blocks:
            return False
        block = self._kept.popleft()
        if len(self._copies(block.block_hash)) == 1:  # others are in use, for none are loose
            page = self.blocks[self._host.pop()]
            self.move_block_hashes(block, page)
            self._kinds[page.block_id] = Kind.SPILLED
            self.states.move_page(block.block_id, page.block_id)
        self._clean(block)
        return True

    def _lose(self, page: KVCacheBlock) -> None:
        """Forget a spilled page."""
        self._maybe_evict_cached_block(page)
        self.give_host([page.block_id])

    def _evict_page(self, queue: FreeKVCacheBlockQueue) -> None:
        self._clean(queue.popleft())
        self.page_evictions += 1

    def _clean(self, block: KVCacheBlock) -> None:
        """Let others have the place of a page that is in no queue."""
        self._maybe_evict_cached_block(block)
        self._kinds[block.block_id] = Kind.CLEAN
        self.free_block_queue.prepend_n([block])


def install(kv_cache_manager: Any, page_group: int, num_host_blocks: int) -> ArenaPool:
    """Put an `ArenaPool` where vLLM's coordinator and managers have their pool, before the first request."""
    coordinator = kv_cache_manager.coordinator
    old = coordinator.block_pool
    arena = ArenaPool.like(old, page_group, num_host_blocks)
    coordinator.block_pool = kv_cache_manager.block_pool = arena
    for manager in coordinator.single_type_managers:
        if manager.block_pool is old:
            manager.block_pool, manager._null_block = arena, arena.null_block
    return arena
