"""The slots as vLLM's coordinator sees a block pool, and the tier of host memory behind them."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock, make_block_hash_with_group_id
from vllm.v1.request import Request

from kimi_vllm.cache.eviction import Eviction
from kimi_vllm.cache.host_tier import HostTier
from kimi_vllm.cache.prefixes import Lineage
from kimi_vllm.cache.slots import NULL_SLOT, SlotAllocator


class SlotPool:
    """One handle per slot for vLLM; the bookkeeping is `SlotAllocator`'s and `HostTier`'s.

    Implements the part of `BlockPool` that vLLM calls on a manager's pool. KV events are not emitted for states; the
    pages' events are complete without them.

    Args:
        num_slots: Slots on the device, the null slot included.
        hash_block_size: Tokens per block hash.
        block_size: Tokens per block of a lineage.
        num_host_slots: States that host memory has room for.
        eviction: See `EvictionQueue`.

    Attributes:
        moves: Copies ``(source, target)`` that the workers make, in order, before their next step. Ids from
            `num_slots` on are host slots.
        counts: Numbers of evictions, swaps_out and swaps_in so far.
    """

    def __init__(
        self,
        num_slots: int,
        hash_block_size: int,
        block_size: int,
        num_host_slots: int = 0,
        eviction: Eviction = "value",
    ) -> None:
        self.slots = SlotAllocator(num_slots, eviction)
        self.host = HostTier(num_host_slots, eviction)
        self.hash_block_size, self.block_size = hash_block_size, block_size
        handles = [KVCacheBlock(slot, pool=self) for slot in range(num_slots + num_host_slots)]  # type: ignore[arg-type]
        self.blocks, self.host_blocks = handles[:num_slots], handles[num_slots:]
        self.null_block = self.blocks[NULL_SLOT]
        self.null_block.is_null = True
        self.moves: list[tuple[int, int]] = []
        self.counts: Counter[str] = Counter()

    def take(self) -> KVCacheBlock:
        """A slot to write, with one reference. A checkpoint evicted for it goes to host memory, if there is room."""
        slot, evicted = self.slots.take()
        if evicted is not None:
            self.blocks[slot].reset_hash()
            self.counts["evictions"] += 1
            if (host_slot := self.host.store(*evicted)) is not None:
                self.moves.append((slot, self.slots.num_slots + host_slot))
                self.counts["swaps_out"] += 1
        return self.blocks[slot]

    def is_on_host(self, block: KVCacheBlock) -> bool:
        """Whether a hit must be loaded before a step can read it."""
        return int(block.block_id) >= self.slots.num_slots

    def load(self, block: KVCacheBlock, group_id: int) -> KVCacheBlock:
        """Bring a state back from host memory into a slot with one reference, published in its place."""
        host_slot = block.block_id - self.slots.num_slots
        lineage, length = self.host.claim(host_slot)
        loaded = self.take()  # may store a state in the tier; not in the slot we are loading from
        self.moves.append((block.block_id, loaded.block_id))
        self.host.release(host_slot)
        self.counts["swaps_in"] += 1
        self.publish(loaded, lineage, length, group_id)
        return loaded

    def take_moves(self) -> list[tuple[int, int]]:
        """The copies since the last call."""
        moves, self.moves = self.moves, []
        return moves

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
            if slot < self.slots.num_slots:
                self.withdraw(self.blocks[slot])
            else:
                self.host.withdraw(slot - self.slots.num_slots)

    def get_cached_block(self, block_hash: BlockHash, kv_cache_group_ids: list[int]) -> list[KVCacheBlock] | None:
        """The slot that holds the state for this prefix, on the device or on the host, or None.

        All KDA layers are one group, so there is one slot.
        """
        [_] = kv_cache_group_ids
        if (slot := self.slots.find(block_hash)) is not None:
            return [self.blocks[slot]]
        if (host_slot := self.host.find(block_hash)) is not None:
            return [self.host_blocks[host_slot]]
        return None

    def longest(self, lineage: Lineage, limit: int) -> int:
        """Blocks of the longest prefix with a state, on the device or on the host, of at most `limit`; 0 for none."""
        return max(self.slots.longest(lineage, limit), self.host.longest(lineage, limit))

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
