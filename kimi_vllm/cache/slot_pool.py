"""The slots as vLLM's coordinator sees a block pool, and the tier of host memory behind them."""

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    KVCacheBlock,
    make_block_hash_with_group_id,
    resolve_block_hashes,
)
from vllm.v1.request import Request

from kimi_vllm.cache.arena import ArenaPool
from kimi_vllm.cache.eviction import Eviction
from kimi_vllm.cache.exchange import Operation
from kimi_vllm.cache.host_tier import HostTier
from kimi_vllm.cache.prefixes import Lineage
from kimi_vllm.cache.slots import NULL_SLOT, SlotAllocator


class SlotPool:
    """One handle per slot for vLLM; the bookkeeping is `SlotAllocator`'s and `HostTier`'s, the blocks are the arena's.

    Implements the part of `BlockPool` that vLLM calls on a manager's pool. KV events are not emitted for states; the
    pages' events are complete without them.

    Args:
        num_slots: Slot ids on the device, the null slot included.
        state_blocks: Blocks of a slot.
        hash_block_size: Tokens per block hash.
        block_size: Tokens per block of a lineage.
        num_host_blocks: Blocks that host memory has room for.
        eviction: See `EvictionQueue`.

    Attributes:
        slots, host: Who has which slot, on the device and on the host; from `share` on.
        operations: What the workers do, in order, before their next step (see `exchange.OPERATIONS`).
        counts: Numbers of evictions, of states and pages to the host (swaps_out, page_swaps_out) and back (swaps_in,
            page_swaps_in) so far; and value_lost: blocks of tokens to compute again where states were given up, from
            the device without room on the host, or from the host.
    """

    slots: SlotAllocator
    host: HostTier

    def __init__(
        self,
        num_slots: int,
        state_blocks: int,
        hash_block_size: int,
        block_size: int,
        num_host_blocks: int = 0,
        eviction: Eviction = "value",
    ) -> None:
        self.num_slots, self.state_blocks, self.num_host_blocks = num_slots, state_blocks, num_host_blocks
        num_host_slots = num_host_blocks // state_blocks
        self.hash_block_size, self.block_size = hash_block_size, block_size
        self._eviction = eviction
        handles = [KVCacheBlock(slot, pool=self) for slot in range(num_slots + num_host_slots)]  # type: ignore[arg-type]
        self.blocks, self.host_handles = handles[:num_slots], handles[num_slots:]
        self.null_block = self.blocks[NULL_SLOT]
        self.null_block.is_null = True
        self.operations: list[Operation] = []
        self.counts: Counter[str] = Counter()

    def share(self, arena: ArenaPool) -> None:
        """Take blocks from this pool from now on."""
        # For a state that goes to host memory they stay, and follow when their place is needed.
        frees_pages = not self.host_handles
        self.slots = SlotAllocator(self.num_slots, self.state_blocks, arena, self._eviction, frees_pages=frees_pages)
        self.host = HostTier(len(self.host_handles), self.state_blocks, arena, self._eviction, arena.cover)
        self._arena = arena
        arena.states = self

    # What the arena calls.

    @property
    def num_reclaimable(self) -> int:
        """Slots that give up their blocks when asked."""
        return self.slots.num_reclaimable

    @property
    def backing(self) -> dict[int, list[int]]:
        """The blocks of every slot that has any."""
        return self.slots.backing

    @property
    def host_backing(self) -> dict[int, list[int]]:
        """The blocks of every host slot that has any."""
        return self.host.backing

    def move_page(self, source: int, target: int) -> None:
        """Have a page copied from one block to another before the next step, in order with what is done to slots."""
        self.operations.append(([source], [target]))
        self.counts["page_swaps_out" if target >= self._arena.num_gpu_blocks else "page_swaps_in"] += 1

    def covered(self) -> Iterator[Any]:
        """Keys of the pages that kept states need, once for the device and once for the host."""
        return chain(self.slots.covered(), self.host.covered())

    def drop_spare(self) -> bool:
        """Give back the blocks of a slot that holds nothing; False if there is none."""
        return self.slots.drop_spare()

    def evict(self) -> bool:
        """Make the checkpoint to evict first a spare slot; it goes to host memory, if there is any. False for none."""
        slot = self.slots.victim()
        if slot is None:
            return False
        lineage, length = self.slots.origin(slot)
        # Stored before it is forgotten: its pages are needed all the time.
        if (host_slot := self.host.store(lineage, length)) is not None:
            self.operations.append((self.num_slots + host_slot, self.host.backing[host_slot]))
            self.operations.append((slot, self.num_slots + host_slot))
            self.counts["swaps_out"] += 1
        elif self.host.find(lineage[length - 1]) is None:
            self.counts["value_lost"] += self.slots.value(slot)
        self.slots.evict()
        self.blocks[slot].reset_hash()
        self.counts["evictions"] += 1
        return True

    def evict_from_host(self) -> bool:
        """Forget the state in host memory to evict first, and so the pages it needs; False if there is none."""
        return self.host.drop()

    # What the manager and vLLM call.

    def take(self) -> KVCacheBlock:
        """A slot to write, with one reference."""
        if not self.slots.num_spare and self._arena.num_worthless < self.state_blocks:
            self.evict()  # and have its blocks
        slot, fresh = self.slots.take()
        if fresh:
            self.operations.append((slot, self.slots.backing[slot]))
        return self.blocks[slot]

    def is_on_host(self, block: KVCacheBlock) -> bool:
        """Whether a hit must be loaded before a step can read it."""
        return int(block.block_id) >= self.num_slots

    def load(self, block: KVCacheBlock, group_id: int) -> KVCacheBlock:
        """Bring a state back from host memory into a slot with one reference, published in its place."""
        host_slot = block.block_id - self.num_slots
        lineage, length = self.host.claim(host_slot)
        loaded = self.take()  # may store a state in the tier; not in the slot we are loading from
        self.operations.append((block.block_id, loaded.block_id))
        self.host.release(host_slot)
        self.counts["swaps_in"] += 1
        self.publish(loaded, lineage, length, group_id)
        return loaded

    def take_operations(self) -> list[Operation]:
        """The operations since the last call."""
        operations, self.operations = self.operations, []
        return operations

    def touch(self, blocks: Iterable[KVCacheBlock]) -> None:
        """Add a reference to each slot."""
        for block in blocks:
            self.slots.retain(block.block_id)

    def free_blocks(self, ordered_blocks: Iterable[KVCacheBlock]) -> None:
        """Drop a reference of each slot; null entries are skipped."""
        for block in ordered_blocks:
            if not block.is_null:
                self.slots.release(block.block_id)

    def publish(self, block: KVCacheBlock, lineage: Lineage, length: int, group_id: int) -> bool:
        """Offer a slot's state, after `length` blocks of `lineage`, to requests with the same prefix."""
        if not self.slots.publish(block.block_id, lineage, length):
            return False
        key: Any = lineage[length - 1]
        # From the length vLLM computes what a prompt has added to the cache.
        block.set_block_hash(make_block_hash_with_group_id(key, group_id), num_tokens=length * self.block_size)
        return True

    def withdraw(self, block: KVCacheBlock) -> None:
        """Withdraw a slot's state, if it is published."""
        if self.slots.withdraw(block.block_id):
            block.reset_hash()

    def withdraw_slots(self, slots: Iterable[int]) -> None:
        """Withdraw whatever is published in these slots, host slots included."""
        for slot in slots:
            if slot < self.num_slots:
                self.withdraw(self.blocks[slot])
            else:
                self.host.withdraw(slot - self.num_slots)

    def get_cached_block(self, block_hash: BlockHash, kv_cache_group_ids: list[int]) -> list[KVCacheBlock] | None:
        """The slot that holds the state for this prefix, on the device or on the host, or None.

        All KDA layers are one group, so there is one slot.
        """
        [_] = kv_cache_group_ids
        if (slot := self.slots.find(block_hash)) is not None:
            return [self.blocks[slot]]
        if (host_slot := self.host.find(block_hash)) is not None:
            return [self.host_handles[host_slot]]
        return None

    def longest(self, lineage: Lineage, limit: int) -> int:
        """Blocks of the longest prefix with a state, on the device or on the host, of at most `limit`; 0 for none."""
        return max(self.slots.longest(lineage, limit), self.host.longest(lineage, limit))

    def last_kept(self, request: Request, most: int) -> int:
        """Tokens before the last of a request's boundaries with a state on the device, of at most so many; 0: none."""
        hashes = self._hashes(request)
        limit = min(len(hashes), max(0, most) // self.block_size)
        return self.slots.longest(hashes, limit) * self.block_size

    def hold_kept(self, request: Request, count: int) -> KVCacheBlock:
        """The slot with the state that `last_kept` found, referenced."""
        slot = self.slots.find(self._hashes(request)[count // self.block_size - 1])
        assert slot is not None
        self.slots.retain(slot)
        return self.blocks[slot]

    def _hashes(self, request: Request) -> Any:
        return resolve_block_hashes(request.block_hashes, self.hash_block_size, self.block_size)

    def reset_prefix_cache(self) -> bool:
        """Forget every checkpoint. False, and nothing changed, while requests still hold slots."""
        if self.slots.num_live:
            return False
        self.withdraw_slots(self.slots.slots())
        self.host.clear()
        return True

    def emit_cached_block_events(
        self, request: Request, num_cached_blocks: int, block_size: int, kv_cache_group_id: int
    ) -> None:
        """No events for states (see the class)."""

    def check(self, tables: Iterable[Iterable[KVCacheBlock]]) -> None:
        """Verify that every slot is held by whom it is counted for; raises AssertionError.

        Args:
            tables: The slots of all requests, and of those whose slots are still to be freed.
        """
        self.slots.check()
        self.host.check()
        held = Counter(block.block_id for table in tables for block in table if not block.is_null)
        counted = {slot: self.slots.references(slot) for slot in range(self.num_slots) if self.slots.references(slot)}
        assert held == counted, f"slots are held {held}, and counted {counted}"
        published = {block.block_id for block in self.blocks if block.block_hash is not None}
        assert published == set(self.slots.slots()), "handles disagree with what is published"
