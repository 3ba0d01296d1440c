"""States that were evicted from the pool, kept in the host's memory: found by key, given up by the same policy.

Pure: host slots and blocks are integers, keys are opaque. No vLLM, no torch. `SlotPool.operations` tells who copies
what.
"""

from collections.abc import Sequence
from typing import Protocol

from kimi_vllm.cache.checkpoints import CheckpointIndex, Cover
from kimi_vllm.cache.eviction import Eviction
from kimi_vllm.cache.prefixes import Lineage


class HostBlocks(Protocol):
    """Host memory, which the pages that these states need are in too."""

    def take_host(self, count: int) -> list[int] | None:
        """So many blocks for a slot; None if there are fewer."""

    def give_host(self, ids: Sequence[int]) -> None:
        """Take them back."""


class HostTier(CheckpointIndex):
    """Host slots, each free or holding one state that nobody is using: all that are held are idle.

    Args:
        num_slots: Host slots, from 0; none at all is fine.
        state_blocks: Blocks of a state.
        blocks: Where they come from. There are enough for all slots, if no page is among them.
        eviction: See `EvictionQueue`.
        cover: See `CheckpointIndex`. A state can only be resumed with its pages, and what is lost with one is too.

    Attributes:
        backing: The blocks of every slot that has any.
        value_lost: Blocks of tokens to compute again of all states that were given up.
    """

    def __init__(
        self,
        num_slots: int,
        state_blocks: int,
        blocks: HostBlocks,
        eviction: Eviction = "value",
        cover: Cover | None = None,
    ) -> None:
        super().__init__(eviction, state_blocks, cover)
        self.num_slots, self.state_blocks = num_slots, state_blocks
        self.backing: dict[int, list[int]] = {}
        self.value_lost = 0
        self._blocks = blocks
        self._free = list(range(num_slots))

    def store(self, lineage: Lineage, length: int) -> int | None:
        """Make room for the state after `length` blocks of `lineage`.

        Returns:
            The host slot to copy it to; None if it is here already, or if nothing can make room for it.
        """
        if not self.num_slots or self.find(lineage[length - 1]) is not None:
            return None
        while (blocks := self._blocks.take_host(self.state_blocks)) is None:
            if not self.drop():
                return None  # the only ones are being loaded, or pages of states on the device are everywhere
        slot = self._free.pop()
        self.backing[slot] = blocks
        # A copy, for the request's own list goes on to the end of its answer and would live as long as the state.
        self.add(slot, lineage[:length], length)
        self.park(slot)
        return slot

    def drop(self) -> bool:
        """Give up the state to evict first; False if there is none."""
        if (slot := self.victim()) is None:
            return False
        self.value_lost += self.value(slot)
        self.evict()
        self.release(slot)
        return True

    def claim(self, slot: int) -> tuple[Lineage, int]:
        """Take a state out to load it; its host slot stays reserved until `release`.

        Returns:
            What it was stored with.
        """
        origin = self.origin(slot)
        self.forget(slot)
        return origin

    def release(self, slot: int) -> None:
        """A claimed slot has been copied, or will be before anything that is copied to it from now on."""
        self._free.append(slot)
        self._blocks.give_host(self.backing.pop(slot))

    def withdraw(self, slot: int) -> None:
        """Forget a state, if the slot holds one."""
        if self.holds(slot):
            self.claim(slot)
            self.release(slot)

    def clear(self) -> None:
        """Forget every state."""
        for slot in self.slots():
            self.withdraw(slot)

    def check(self) -> None:
        """Verify that no host slot is lost; raises AssertionError."""
        held = set(self.slots())
        assert held.isdisjoint(self._free), "a host slot is free and held"
        assert len(held) + len(self._free) == self.num_slots, "a host slot is lost"
        assert self.backing.keys() == held, "host slots with blocks are not those held"
        assert all(len(ids) == self.state_blocks for ids in self.backing.values()), "a host slot lacks blocks"
        super().check()
