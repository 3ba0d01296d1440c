"""Which boundaries are kept, found again, and dropped.

Paged KV can be shared block by block; a recurrent state cannot, for it stands for one exact prefix. So a request can
resume only where somebody kept a state, and keeping one costs a slot. `boundaries_to_keep` says where that pays;
`CheckpointIndex` finds kept states by key and says which one to give up first (least recently used).

Pure on purpose: slots are integers, keys are opaque. No vLLM, no torch.
"""

from collections import OrderedDict
from collections.abc import Hashable


def boundaries_to_keep(num_prompt_tokens: int, block_size: int, junction: int = 0, interval: int = 0) -> frozenset[int]:
    """Token positions in a prompt at which a later request is likely to resume.

    The last block boundary of the prompt serves a continuation of it; one token less serves the same prompt again,
    whose last token must be computed to get logits. The junction is where another request's shared prefix ended
    without a state (Marconi's admission, arXiv 2411.19379).

    Args:
        num_prompt_tokens: length of the prompt.
        block_size: tokens per block; every boundary is a multiple of it.
        junction: end of a prefix known to be shared, or 0.
        interval: also keep one boundary per so many tokens, rounded up to blocks; 0 for none.
    """
    kept = {num_prompt_tokens, num_prompt_tokens - 1, junction}
    kept = {position // block_size * block_size for position in kept}
    if interval:
        stride = -(-interval // block_size) * block_size
        kept.update(range(stride, num_prompt_tokens + 1, stride))
    return frozenset(position for position in kept if 0 < position <= num_prompt_tokens)


class CheckpointIndex:
    """Finds published slots by key and keeps the unreferenced ones in order of last use."""

    def __init__(self) -> None:
        self._slot_by_key: dict[Hashable, int] = {}
        self._key_by_slot: dict[int, Hashable] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_idle(self) -> int:
        """Checkpoints that nobody references."""
        return len(self._idle)

    def holds(self, slot: int) -> bool:
        """Whether the slot is published."""
        return slot in self._key_by_slot

    def find(self, key: Hashable) -> int | None:
        """The slot published under `key`."""
        return self._slot_by_key.get(key)

    def slots(self) -> list[int]:
        """All published slots."""
        return list(self._key_by_slot)

    def idle_slots(self) -> set[int]:
        """Published slots that nobody references."""
        return set(self._idle)

    def add(self, slot: int, key: Hashable) -> bool:
        """Publish a referenced slot. False if the key is known: one state per prefix is enough."""
        if slot in self._key_by_slot:
            raise ValueError(f"slot {slot} is published already: its contents must not change")
        if key in self._slot_by_key:
            return False
        self._slot_by_key[key] = slot
        self._key_by_slot[slot] = key
        return True

    def forget(self, slot: int) -> None:
        """Withdraw a slot, idle or not."""
        del self._slot_by_key[self._key_by_slot.pop(slot)]
        self._idle.pop(slot, None)

    def park(self, slot: int) -> None:
        """The last reference is gone: the slot may be evicted, after all that were parked before it."""
        self._idle[slot] = None

    def wake(self, slot: int) -> None:
        """Somebody resumes from the slot: it may not be evicted."""
        del self._idle[slot]

    def victim(self) -> int | None:
        """The idle checkpoint to evict first: the one unused for longest."""
        return next(iter(self._idle), None)

    def check(self) -> None:
        """Verify that the two maps and the order agree; raises AssertionError."""
        assert {slot: key for key, slot in self._slot_by_key.items()} == self._key_by_slot, "the maps disagree"
        assert self._idle.keys() <= self._key_by_slot.keys(), "an idle slot is not published"
