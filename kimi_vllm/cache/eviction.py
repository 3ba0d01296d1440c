"""Which idle checkpoint goes first when a slot is needed: two policies with one interface.

Pure on purpose: slots are integers, values are whole numbers. No vLLM, no torch.
"""

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
        self._idle: dict[int, None] = {}

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
        self._rank: dict[int, int] = {}
        self._parked_at: dict[int, int] = {}
        self._age = 0

    def park(self, slot: int, value: int) -> None:
        """See `EvictionPolicy`."""
        self._parked_at[slot] = self._age
        self._rank[slot] = self._age + value

    def revalue(self, slot: int, value: int) -> None:
        """See `EvictionPolicy`."""
        self._rank[slot] = self._parked_at[slot] + value

    def remove(self, slot: int) -> None:
        """See `EvictionPolicy`."""
        if self._rank.pop(slot, None) is not None:
            del self._parked_at[slot]

    def victim(self) -> int | None:
        """See `EvictionPolicy`."""
        if not self._rank:
            return None
        slot = min(self._rank, key=self._rank.__getitem__)  # the first one, so the oldest, among equals
        self._age = max(self._age, self._rank[slot])
        return slot


POLICIES: dict[str, type[ByValue] | type[ByRecency]] = {"value": ByValue, "lru": ByRecency}
"""By the names of the option ``eviction``."""
