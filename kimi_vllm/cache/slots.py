"""Who owns which state slot, and its blocks.

A slot is an id. What is written to it lies in blocks, which it has unless it is *bare*. With blocks it is *spare*,
holding nothing, so that the next to take it needs none; *live*, referenced by at least one request (which may be
writing it, or resuming from it); or an *idle checkpoint*, referenced by nobody and kept because a later request may
resume from it. Slot 0 is none of these: it is the null slot of padded rows.

Pure: slots and blocks are integers, keys are opaque. No vLLM, no torch.
"""

from collections import deque
from collections.abc import Iterable
from itertools import combinations
from typing import Protocol

from kimi_vllm.cache.checkpoints import CheckpointIndex
from kimi_vllm.cache.eviction import Eviction
from kimi_vllm.cache.prefixes import Lineage

NULL_SLOT = 0


class NoSlotError(RuntimeError):
    """A slot was taken without asking `can_take` first."""


class Blocks(Protocol):
    """Where a slot's memory comes from."""

    def get_num_free_blocks(self) -> int:
        """Blocks to be had at all, those of spare slots and idle checkpoints among them."""

    def take_state(self) -> list[int]:
        """So many as a slot needs."""

    def give_state(self, ids: Iterable[int]) -> None:
        """Take them back."""

    def cover(self, change: int, lineage: Lineage, start: int, stop: int) -> None:
        """See `checkpoints.Cover`."""


class SlotAllocator(CheckpointIndex):
    """Hands slots out and takes them back, and is the index of those published.

    Every method either succeeds or changes nothing.

    Args:
        num_slots: All ids, the null slot included.
        state_blocks: Blocks of a slot.
        blocks: Where they come from.
        eviction: See `EvictionQueue`.
        frees_pages: Whether a state that is evicted is lost, and so are the pages that only it needs.

    Attributes:
        backing: The blocks of every slot that has any.
    """

    def __init__(
        self,
        num_slots: int,
        state_blocks: int,
        blocks: Blocks,
        eviction: Eviction = "value",
        *,
        frees_pages: bool = True,
    ) -> None:
        super().__init__(eviction, state_blocks if frees_pages else 0, blocks.cover)
        self.num_slots, self.state_blocks = num_slots, state_blocks
        self._blocks = blocks
        self.backing: dict[int, list[int]] = {}
        self._bare: deque[int] = deque(range(1, num_slots))
        self._spare: list[int] = []
        self._references = [0] * num_slots

    @property
    def num_spare(self) -> int:
        """Slots that hold nothing, but have blocks."""
        return len(self._spare)

    @property
    def num_reclaimable(self) -> int:
        """Slots whose blocks can be had."""
        return len(self._spare) + len(self._idle)

    @property
    def num_live(self) -> int:
        """Slots that requests reference."""
        return len(self.backing) - self.num_reclaimable

    def can_take(self, count: int, reserve: int = 0) -> bool:
        """Whether `count` calls of `take` will succeed and leave so many blocks."""
        return count * self.state_blocks + reserve <= self._blocks.get_num_free_blocks()

    def take(self) -> tuple[int, bool]:
        """Hand out a slot with one reference: a spare one, or else a bare one.

        Returns:
            The slot, and whether it has got blocks. Its contents are whatever they were: a fresh slot is never read
            before it is written.

        Raises:
            NoSlotError: There are not so many blocks.
        """
        if fresh := not self._spare:
            if not self.can_take(1):
                raise NoSlotError(f"no blocks for a slot beside {self.num_live} live ones")
            blocks = self._blocks.take_state()  # from a slot that becomes bare, perhaps
            slot = self._bare.popleft()
            self.backing[slot] = blocks
        else:
            slot = self._spare.pop()
        self._references[slot] = 1
        return slot, fresh

    def drop_spare(self) -> bool:
        """Give the blocks of a spare slot back. False if there is none."""
        if not self._spare:
            return False
        slot = self._spare.pop()
        self._bare.append(slot)
        self._blocks.give_state(self.backing.pop(slot))
        return True

    def evict(self) -> tuple[int, tuple[Lineage, int]] | None:
        """Make the idle checkpoint to evict first a spare slot. Returns it and its `origin`; None if there is none."""
        if (evicted := super().evict()) is not None:
            self._spare.append(evicted[0])
        return evicted

    def retain(self, slot: int) -> None:
        """Add a reference to a live slot or an idle checkpoint."""
        if not self._references[slot] and not self.holds(slot):
            raise ValueError(f"slot {slot} is free: there is nothing to reference")
        if not self._references[slot]:
            self.wake(slot)
        self._references[slot] += 1

    def release(self, slot: int) -> None:
        """Drop a reference. The last one turns a checkpoint idle and any other slot spare."""
        if not self._references[slot]:
            raise ValueError(f"slot {slot} has no reference to drop")
        self._references[slot] -= 1
        if self._references[slot]:
            return
        if self.holds(slot):
            self.park(slot)
        else:
            self._spare.append(slot)

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
        """Make a checkpoint an ordinary slot again; an idle one becomes spare. False if it was none."""
        if not self.holds(slot):
            return False
        self.forget(slot)
        if not self._references[slot]:
            self._spare.append(slot)
        return True

    def check(self) -> None:
        """Verify the invariants; raises AssertionError with what broke. Called by tests after every scenario."""
        parts = {
            "spare": set(self._spare),
            "bare": set(self._bare),
            "idle": self.idle_slots(),
            "live": {slot for slot in range(self.num_slots) if self._references[slot]},
        }
        assert len(parts["spare"]) == len(self._spare), "a slot is spare twice"
        assert len(parts["bare"]) == len(self._bare), "a slot is bare twice"
        for one, other in combinations(parts, 2):
            assert not parts[one] & parts[other], f"{one} and {other}: {parts[one] & parts[other]}"
        assert set().union(*parts.values()) == set(range(1, self.num_slots)), "a slot is lost, or is the null slot"
        assert self.backing.keys() == parts["spare"] | parts["idle"] | parts["live"], (
            "slots with blocks are not those held"
        )
        super().check()
