"""The slots as vLLM's coordinator sees a block pool."""

from collections.abc import Iterable
from typing import Any

from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock, make_block_hash_with_group_id
from vllm.v1.request import Request

from kimi_vllm.cache.slots import NULL_SLOT, SlotAllocator


class SlotPool:
    """One handle per slot for vLLM; the bookkeeping is `SlotAllocator`'s.

    Implements the part of `BlockPool` that vLLM calls on a manager's pool. KV events are not emitted for states; the
    pages' events are complete without them.
    """

    def __init__(self, num_slots: int, hash_block_size: int) -> None:
        self.slots = SlotAllocator(num_slots)
        self.hash_block_size = hash_block_size
        self.blocks = [KVCacheBlock(slot, pool=self) for slot in range(num_slots)]  # type: ignore[arg-type]
        self.null_block = self.blocks[NULL_SLOT]
        self.null_block.is_null = True

    def take(self) -> KVCacheBlock:
        """A slot to write, with one reference."""
        slot, evicted = self.slots.take()
        if evicted:
            self.blocks[slot].reset_hash()
        return self.blocks[slot]

    def touch(self, blocks: Iterable[KVCacheBlock]) -> None:
        """Add a reference to each slot."""
        for block in blocks:
            self.slots.retain(block.block_id)

    def free_blocks(self, ordered_blocks: Iterable[KVCacheBlock]) -> None:
        """Drop a reference of each slot; null entries are skipped."""
        for block in ordered_blocks:
            if not block.is_null:
                self.slots.release(block.block_id)

    def publish(self, block: KVCacheBlock, key: Any, num_tokens: int) -> bool:
        """Offer a slot's state, after `num_tokens` tokens, to requests with the same prefix."""
        if not self.slots.publish(block.block_id, key):
            return False
        block.set_block_hash(key, num_tokens=num_tokens)
        return True

    def withdraw(self, block: KVCacheBlock) -> None:
        """Take a published state back; unpublished slots are left alone."""
        if self.slots.withdraw(block.block_id):
            block.reset_hash()

    def get_cached_block(self, block_hash: BlockHash, kv_cache_group_ids: list[int]) -> list[KVCacheBlock] | None:
        """The published slot of each group for this prefix, or None if a group has none."""
        found = [self.slots.find(make_block_hash_with_group_id(block_hash, group)) for group in kv_cache_group_ids]
        if any(slot is None for slot in found):
            return None
        return [self.blocks[slot] for slot in found if slot is not None]

    def reset_prefix_cache(self) -> bool:
        """Forget every checkpoint. False, and nothing changed, while requests still hold slots."""
        if self.slots.num_live:
            return False
        for slot in self.slots.withdraw_all():
            self.blocks[slot].reset_hash()
        return True

    def emit_cached_block_events(
        self, request: Request, num_cached_blocks: int, block_size: int, kv_cache_group_id: int
    ) -> None:
        """No events for states (see the class)."""
