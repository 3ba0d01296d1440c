"""States that were evicted from the pool, kept in the host's memory: found by key, given up by the same policy.

Pure: host slots are integers, keys are opaque. No vLLM, no torch. `SlotPool.operations` tells who copies what.
"""

from kimi_vllm.cache.checkpoints import CheckpointIndex, Cover
from kimi_vllm.cache.eviction import Eviction
from kimi_vllm.cache.prefixes import Lineage


class HostTier(CheckpointIndex):
    """Host slots, each free or holding one state that nobody is using: all that are held are idle.

    Args:
        num_slots: Host slots, from 0; none at all is fine.
        eviction: See `EvictionQueue`.
        cover: See `CheckpointIndex`. A state can only be resumed with its pages, which stay on the device.

    Attributes:
        value_lost: Blocks of tokens to compute again of all states that were given up.
    """

    def __init__(self, num_slots: int, eviction: Eviction = "value", cover: Cover | None = None) -> None:
        super().__init__(eviction, cover=cover)
        self.num_slots = num_slots
        self.value_lost = 0
        self._free = list(range(num_slots))

    def store(self, lineage: Lineage, length: int) -> int | None:
        """Make room for the state after `length` blocks of `lineage`.

        Returns:
            The host slot to copy it to; None if it is here already, or if there is no host memory at all.
        """
        if not self.num_slots or self.find(lineage[length - 1]) is not None:
            return None
        if not self._free and not self.drop():
            return None  # the only ones are being loaded
        slot = self._free.pop()
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
        self._free.append(slot)
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
        super().check()
