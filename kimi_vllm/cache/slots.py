"""Who owns which state slot.

A slot is in one of three states: *free*; *live*, referenced by at least one request (which may be writing it, or
resuming from it); or *idle checkpoint*, referenced by nobody and kept because a later request may resume from it.
Slot 0 is none of these: it is the null slot of padded rows. So free + live + idle = number of slots - 1, always.

Pure: slots are integers, keys are opaque. No vLLM, no torch.
"""

from collections import deque

from kimi_vllm.cache.checkpoints import CheckpointIndex
from kimi_vllm.cache.eviction import Eviction
from kimi_vllm.cache.prefixes import Lineage

NULL_SLOT = 0
MIN_SLOTS = 3
"""The null slot and two more: resuming from a checkpoint reads one slot while it writes another."""


class NoSlotError(RuntimeError):
    """A slot was taken without asking `can_take` first."""


class SlotAllocator(CheckpointIndex):
    """Hands slots out and takes them back, and is the index of those published; evicts idle ones when nothing is free.

    Every method either succeeds or changes nothing.

    Args:
        num_slots: All slots, the null slot included; at least `MIN_SLOTS`.
        eviction: See `EvictionQueue`.
    """

    def __init__(self, num_slots: int, eviction: Eviction = "value") -> None:
        if num_slots < MIN_SLOTS:
            raise ValueError(f"num_slots={num_slots}: at least {MIN_SLOTS} are needed (one of them is the null slot).")
        super().__init__(eviction)
        self.num_slots = num_slots
        self._free: deque[int] = deque(range(1, num_slots))
        self._references = [0] * num_slots

    @property
    def num_free(self) -> int:
        """Slots that hold nothing."""
        return len(self._free)

    @property
    def num_live(self) -> int:
        """Slots that requests reference."""
        return self.num_slots - 1 - self.num_free - self.num_idle

    @property
    def num_available(self) -> int:
        """Slots that `take` can hand out."""
        return self.num_free + self.num_idle

    def can_take(self, count: int) -> bool:
        """Whether `count` calls of `take` will succeed."""
        return count <= self.num_available

    def take(self) -> tuple[int, tuple[Lineage, int] | None]:
        """Hand out a slot with one reference.

        Returns:
            The slot, and what the checkpoint was published with that had to be evicted for it. The slot's contents
            are whatever they were: a fresh slot is never read before it is written.

        Raises:
            NoSlotError: Nothing is free and every checkpoint is in use.
        """
        if self._free:
            slot, origin = self._free.popleft(), None
        elif (evicted := self.evict()) is not None:
            slot, origin = evicted
        else:
            raise NoSlotError(f"all {self.num_slots - 1} slots are live")
        self._references[slot] = 1
        return slot, origin

    def retain(self, slot: int) -> None:
        """Add a reference to a live slot or an idle checkpoint."""
        if not self._references[slot] and not self.holds(slot):
            raise ValueError(f"slot {slot} is free: there is nothing to reference")
        if not self._references[slot]:
            self.wake(slot)
        self._references[slot] += 1

    def release(self, slot: int) -> None:
        """Drop a reference. The last one turns a checkpoint idle and frees any other slot."""
        if not self._references[slot]:
            raise ValueError(f"slot {slot} has no reference to drop")
        self._references[slot] -= 1
        if self._references[slot]:
            return
        if self.holds(slot):
            self.park(slot)
        else:
            self._free.append(slot)

    def references(self, slot: int) -> int:
        """How many requests reference the slot."""
        return self._references[slot]

    def publish(self, slot: int, lineage: Lineage, length: int) -> bool:
        """Offer a live slot to other requests as the state after `length` blocks of `lineage`.

        Returns:
            False if that state is published already.
        """
        if not self._references[slot]:
            raise ValueError(f"slot {slot} is not live: only its owner can publish it")
        return self.add(slot, lineage, length)

    def withdraw(self, slot: int) -> bool:
        """Make a checkpoint an ordinary slot again; an idle one becomes free. False if it was none."""
        if not self.holds(slot):
            return False
        self.forget(slot)
        if not self._references[slot]:
            self._free.append(slot)
        return True

    def check(self) -> None:
        """Verify the invariants; raises AssertionError with what broke. Called by tests after every scenario."""
        free = set(self._free)
        idle = self.idle_slots()
        live = {slot for slot in range(1, self.num_slots) if self._references[slot]}
        assert len(free) == len(self._free), "a slot is free twice"
        assert NULL_SLOT not in free | idle | live, "the null slot was handed out"
        assert not free & idle, f"free and idle: {free & idle}"
        assert not free & live, f"free and live: {free & live}"
        assert not idle & live, f"idle and live: {idle & live}"
        assert len(free) + len(idle) + len(live) == self.num_slots - 1, "a slot is lost"
        super().check()
