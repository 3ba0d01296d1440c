"""Which idle checkpoint goes first when a slot is needed: two policies with one interface.

Pure on purpose: slots are integers, values are whole numbers. No vLLM, no torch.
"""

from collections import OrderedDict
from heapq import heapify, heappop, heappush
from typing import Protocol


class EvictionPolicy(Protocol):
    """Keeps the idle checkpoints in its order.

    Their value is what keeping them is expected to save: blocks that need not be computed, times uses.
    """

    def park(self, slot: int, value: int) -> None:
        """The checkpoint has just been used for the last time so far, and may be evicted from now on."""

    def revalue(self, slot: int, value: int) -> None:
        """The cost of losing an idle checkpoint has changed, because its nearest ancestor came or went."""

    def remove(self, slot: int) -> None:
        """The checkpoint is in use again, or gone."""

    def victim(self) -> int | None:
        """The slot to give up next; changes nothing but the policy's own clock."""


class ByRecency:
    """Least recently used first."""

    def __init__(self) -> None:
        # A plain dict finds its first key behind all those removed since it last grew.
        self._idle: OrderedDict[int, None] = OrderedDict()

    def park(self, slot: int, value: int) -> None:
        """See `EvictionPolicy`."""
        self._idle[slot] = None

    def revalue(self, slot: int, value: int) -> None:
        """Order does not depend on value."""

    def remove(self, slot: int) -> None:
        """See `EvictionPolicy`."""
        self._idle.pop(slot, None)

    def victim(self) -> int | None:
        """See `EvictionPolicy`."""
        return next(iter(self._idle), None)


class ByValue:
    """Least expected saving first, ageing; least recently used among equals.

    All slots have the same size, so value per byte is value. A value alone would keep a long document that nobody asks
    for again for ever. So a checkpoint is parked at the value of the last one evicted plus its own (GreedyDual:
    N. Young, "The k-server dual and loose competitiveness for paging", Algorithmica 1994; with uses in the value it is
    that of Cherkasova, HPL-98-69R1): unused, it is overtaken.
    Where all values are equal this is least recently used first.
    """

    def __init__(self) -> None:
        self._parked: dict[int, tuple[int, int]] = {}
        self._entry: dict[int, tuple[int, int, int]] = {}
        # With entries that are out of date; `victim` drops those it meets.
        self._heap: list[tuple[int, int, int]] = []
        self._count = 0
        self._age = 0

    def park(self, slot: int, value: int) -> None:
        """See `EvictionPolicy`."""
        self._count += 1
        self._parked[slot] = self._age, self._count
        self.revalue(slot, value)

    def revalue(self, slot: int, value: int) -> None:
        """See `EvictionPolicy`."""
        age, count = self._parked[slot]
        self._entry[slot] = age + value, count, slot
        heappush(self._heap, self._entry[slot])
        if len(self._heap) > 2 * len(self._entry) + 16:
            self._heap = list(self._entry.values())
            heapify(self._heap)

    def remove(self, slot: int) -> None:
        """See `EvictionPolicy`."""
        if self._entry.pop(slot, None) is not None:
            del self._parked[slot]

    def victim(self) -> int | None:
        """See `EvictionPolicy`."""
        while self._heap:
            rank, _, slot = self._heap[0]
            if self._entry.get(slot) == self._heap[0]:
                self._age = max(self._age, rank)
                return slot
            heappop(self._heap)
        return None


POLICIES: dict[str, type[ByValue] | type[ByRecency]] = {"value": ByValue, "lru": ByRecency}
"""By the names of the option ``eviction``."""
