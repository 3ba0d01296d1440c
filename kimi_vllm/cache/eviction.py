"""Which idle checkpoint is evicted first when a slot is needed.

Pure: slots are integers, values are numbers. No vLLM, no torch.
"""

from heapq import heapify, heappop, heappush
from typing import Literal

Eviction = Literal["value", "lru"]
"""Values of the option ``eviction``."""


class EvictionQueue:
    """Idle checkpoints in the order in which they are evicted: least value first, least recently used among equals.

    The value of a checkpoint is what keeping it is expected to save, blocks that need not be recomputed times uses, per
    block that it occupies. By value alone, a long document that nobody asks for again would stay for ever. So a
    checkpoint is parked at its own value plus that of the last one evicted (GreedyDual: N. Young, "The k-server dual
    and loose competitiveness for paging", Algorithmica 1994; with uses in the value it is GDSF, Cherkasova,
    HPL-98-69R1): unused, it is overtaken.

    Args:
        eviction: "value"; or "lru", which is the same order with all values equal.
    """

    def __init__(self, eviction: Eviction = "value") -> None:
        self._by_value = eviction == "value"
        self._parked: dict[int, tuple[float, int]] = {}
        self._entry: dict[int, tuple[float, int, int]] = {}
        # Has entries that are out of date; `victim` drops those it meets.
        self._heap: list[tuple[float, int, int]] = []
        self._count = 0
        self._age: float = 0

    def park(self, slot: int, value: float) -> None:
        """Add a checkpoint that nobody references any more."""
        self._count += 1
        self._parked[slot] = self._age, self._count
        self.revalue(slot, value)

    def revalue(self, slot: int, value: float) -> None:
        """Change the value of an idle checkpoint, because its nearest ancestor came or went."""
        age, count = self._parked[slot]
        self._entry[slot] = age + value * self._by_value, count, slot
        heappush(self._heap, self._entry[slot])
        if len(self._heap) > 2 * len(self._entry) + 16:
            self._heap = list(self._entry.values())
            heapify(self._heap)

    def remove(self, slot: int) -> None:
        """Take a checkpoint out that is in use again or gone; nothing happens if it is not in."""
        if self._entry.pop(slot, None) is not None:
            del self._parked[slot]

    def victim(self) -> int | None:
        """The checkpoint that `evict` would take; asking changes nothing."""
        while self._heap and self._entry.get(self._heap[0][2]) != self._heap[0]:
            heappop(self._heap)
        return self._heap[0][2] if self._heap else None

    def evict(self) -> int | None:
        """Remove the first checkpoint; what is parked from now on starts at its rank."""
        slot = self.victim()
        if slot is not None:
            self._age = max(self._age, self._entry[slot][0])
            self.remove(slot)
        return slot
