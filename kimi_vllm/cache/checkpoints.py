"""Which boundaries are kept, found again, and dropped.

Paged KV can be shared block by block; a recurrent state cannot, for it stands for one exact prefix. So a request can
resume only where somebody kept a state, and keeping one costs a slot. `boundaries_to_keep` says where that pays;
`CheckpointIndex` finds kept states by key and knows what each of them saves; `eviction.py` says which one goes first.

Pure on purpose: slots are integers, keys are opaque. No vLLM, no torch.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from kimi_vllm.cache.eviction import ByValue, EvictionPolicy


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


Lineage = Sequence[Hashable]
"""Keys of a sequence's blocks in order; each stands for everything up to the end of its block, as vLLM's hashes do."""


@dataclass(slots=True)
class _Checkpoint:
    """A published state after `length` blocks of `lineage`, and its place in the tree of published states."""

    lineage: Lineage
    length: int
    uses: int = 0
    parent: int | None = None
    children: set[int] = field(default_factory=set)

    @property
    def key(self) -> Hashable:
        return self.lineage[self.length - 1]

    def continues(self, other: "_Checkpoint") -> bool:
        """Whether this state's sequence runs through the other one."""
        return self.length > other.length and self.lineage[other.length - 1] == other.key


class CheckpointIndex:
    """Finds published slots by key, and knows what losing each would cost: the blocks since its nearest ancestor.

    Args:
        policy: the order in which idle checkpoints are given up.
    """

    def __init__(self, policy: EvictionPolicy | None = None) -> None:
        self._policy = policy or ByValue()
        self._slot_by_key: dict[Hashable, int] = {}
        self._checkpoints: dict[int, _Checkpoint] = {}
        self._roots: set[int] = set()
        self._idle: set[int] = set()

    @property
    def num_idle(self) -> int:
        """Checkpoints that nobody references."""
        return len(self._idle)

    def holds(self, slot: int) -> bool:
        """Whether the slot is published."""
        return slot in self._checkpoints

    def find(self, key: Hashable) -> int | None:
        """The slot published under `key`."""
        return self._slot_by_key.get(key)

    def slots(self) -> list[int]:
        """All published slots."""
        return list(self._checkpoints)

    def idle_slots(self) -> set[int]:
        """Published slots that nobody references."""
        return set(self._idle)

    def origin(self, slot: int) -> tuple[Lineage, int]:
        """The lineage and the number of blocks a slot was published with."""
        checkpoint = self._checkpoints[slot]
        return checkpoint.lineage, checkpoint.length

    def value(self, slot: int) -> int:
        """Blocks to compute again if the slot were lost: those since its nearest published ancestor."""
        checkpoint = self._checkpoints[slot]
        parent = checkpoint.parent
        return checkpoint.length - (0 if parent is None else self._checkpoints[parent].length)

    def worth(self, slot: int) -> int:
        """What keeping the slot is expected to save: its value, times its uses so far and one.

        States that were resumed from before are the ones that will be again: a document's end rather than a question's.
        """
        return self.value(slot) * (1 + self._checkpoints[slot].uses)

    def add(self, slot: int, lineage: Lineage, length: int) -> bool:
        """Publish a referenced slot as the state after `length` blocks of `lineage`, which may only grow from now on.

        Returns:
            False if that state is known: one per prefix is enough.
        """
        if slot in self._checkpoints:
            raise ValueError(f"slot {slot} is published already: its contents must not change")
        new = _Checkpoint(lineage, length)
        if new.key in self._slot_by_key:
            return False
        ancestors = (self._slot_by_key.get(lineage[i]) for i in range(length - 2, -1, -1))
        new.parent = next((ancestor for ancestor in ancestors if ancestor is not None), None)
        self._slot_by_key[new.key] = slot
        self._checkpoints[slot] = new
        siblings = self._children(new.parent)
        heirs = {child for child in siblings if self._checkpoints[child].continues(new)}
        siblings -= heirs
        siblings.add(slot)
        self._adopt(slot, heirs)
        return True

    def forget(self, slot: int) -> None:
        """Withdraw a slot, idle or not."""
        gone = self._checkpoints.pop(slot)
        del self._slot_by_key[gone.key]
        self._children(gone.parent).discard(slot)
        self._adopt(gone.parent, gone.children)
        self._idle.discard(slot)
        self._policy.remove(slot)

    def park(self, slot: int) -> None:
        """The last reference is gone: the slot may be evicted."""
        self._idle.add(slot)
        self._policy.park(slot, self.worth(slot))

    def wake(self, slot: int) -> None:
        """Somebody resumes from the slot: it may not be evicted."""
        self._idle.remove(slot)
        self._checkpoints[slot].uses += 1
        self._policy.remove(slot)

    def victim(self) -> int | None:
        """The idle checkpoint to evict first, by the policy."""
        return self._policy.victim()

    def _children(self, parent: int | None) -> set[int]:
        return self._roots if parent is None else self._checkpoints[parent].children

    def _adopt(self, parent: int | None, orphans: set[int]) -> None:
        self._children(parent).update(orphans)
        for orphan in orphans:
            self._checkpoints[orphan].parent = parent
            if orphan in self._idle:
                self._policy.revalue(orphan, self.worth(orphan))

    def check(self) -> None:
        """Verify that maps, tree and policy agree; raises AssertionError."""
        by_key = {checkpoint.key: slot for slot, checkpoint in self._checkpoints.items()}
        assert by_key == self._slot_by_key, "the maps disagree"
        assert self._idle <= self._checkpoints.keys(), "an idle slot is not published"
        assert (self.victim() is None) == (not self._idle), "the policy lost an idle slot"
        for slot, checkpoint in self._checkpoints.items():
            assert slot in self._children(checkpoint.parent), "a parent does not know its child"
            ancestors = (by_key.get(key) for key in list(checkpoint.lineage[: checkpoint.length - 1])[::-1])
            assert checkpoint.parent == next((a for a in ancestors if a is not None), None), "not the nearest ancestor"
