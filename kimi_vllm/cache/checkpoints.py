"""Which boundaries are kept, found again, and dropped.

Paged KV can be shared block by block; a recurrent state cannot, for it stands for one exact prefix. So a request can
resume only where somebody kept a state, and keeping one costs a slot. `boundaries_to_keep` says where that pays;
`CheckpointIndex` finds kept states by key and knows what each of them saves; `eviction.py` says which one goes first.

Pure: slots are integers, keys are opaque. No vLLM, no torch.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator

from kimi_vllm.cache.eviction import Eviction, EvictionQueue
from kimi_vllm.cache.prefixes import Lineage, Node, PrefixTree


def boundaries_to_keep(
    num_prompt_tokens: int,
    block_size: int,
    junction: int = 0,
    interval: int = 0,
    start: int = 0,
    end: int | None = None,
) -> frozenset[int]:
    """Token positions in a prompt at which a later request is likely to resume.

    The last block boundary of the prompt serves a continuation of it; one token less serves the same prompt again,
    whose last token must be computed to get logits. The junction is where another request's shared prefix ended
    without a state (Marconi's admission, arXiv 2411.19379).

    Args:
        num_prompt_tokens: Length of the prompt.
        block_size: Tokens per block; every boundary is a multiple of it.
        junction: End of a prefix known to be shared, or 0.
        interval: Also keep one boundary per so many tokens, rounded up to blocks; 0 for none.
        start, end: Only positions after `start` and up to `end`, a step's; the whole prompt by default.
    """
    end = num_prompt_tokens if end is None else min(end, num_prompt_tokens)
    kept = {num_prompt_tokens, num_prompt_tokens - 1, junction}
    kept = {position // block_size * block_size for position in kept}
    if interval:
        stride = -(-interval // block_size) * block_size
        kept.update(range((start // stride + 1) * stride, end + 1, stride))
    return frozenset(position for position in kept if start < position <= end)


Cover = Callable[[int, Lineage, int, int], None]
"""Told ``(1, lineage, start, stop)`` where a state needs blocks from now on, and ``(-1, ...)`` where none does."""


class CheckpointIndex:
    """Finds published slots by key, and knows what losing each would cost: the blocks since its nearest ancestor.

    Args:
        eviction: See `EvictionQueue`.
        state_blocks: Blocks of a state, if losing it also frees the pages that only it needs: its value is then
            counted per block. 0 if all that are lost free the same.
        cover: Told which pages of a lineage the published states need.
    """

    def __init__(self, eviction: Eviction = "value", state_blocks: int = 0, cover: Cover | None = None) -> None:
        self._state_blocks = state_blocks
        self._cover: Cover = cover or (lambda change, lineage, start, stop: None)
        self._queue = EvictionQueue(eviction)
        self._tree = PrefixTree()
        self._checkpoints: dict[int, Node] = {}
        self._uses: defaultdict[int, int] = defaultdict(int)
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
        node = self._tree.find(key)
        return None if node is None else node.slot

    def longest(self, lineage: Lineage, limit: int) -> int:
        """Blocks of the longest published prefix of `lineage` that has at most `limit`; 0 if there is none."""
        node = self._tree.longest(lineage, limit)
        return 0 if node is None else node.length

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
        ancestor = checkpoint.ancestor()
        return checkpoint.length - (0 if ancestor is None else ancestor.length)

    def worth(self, slot: int) -> float:
        """What keeping the slot is expected to save: its value, times its uses so far and one; per block, if asked for.

        States that were resumed from before are the ones that will be again: a document's end rather than a question's.
        """
        worth = self.value(slot) * (1 + self._uses[slot])
        if not self._state_blocks:
            return worth
        start, stop = self._checkpoints[slot].own
        return worth / (self._state_blocks + stop - start)

    def add(self, slot: int, lineage: Lineage, length: int) -> bool:
        """Publish a referenced slot as the state after `length` blocks of `lineage`, which may only grow from now on.

        Returns:
            False if that state is known: one per prefix is enough.
        """
        if slot in self._checkpoints:
            raise ValueError(f"slot {slot} is published already: its contents must not change")
        if self._tree.find(lineage[length - 1]) is not None:
            return False
        node = self._checkpoints[slot] = self._tree.add(slot, lineage, length)
        self._cover_own(1, node)
        self._revalue([*node.neighbours(), *node.heirs()])
        return True

    def forget(self, slot: int) -> None:
        """Withdraw a slot, idle or not."""
        node = self._checkpoints.pop(slot)
        self._idle.discard(slot)
        self._uses.pop(slot, None)
        self._queue.remove(slot)
        affected = [*node.neighbours(), *node.heirs()]
        self._cover_own(-1, node)
        self._tree.remove(node)
        self._revalue(affected)

    def park(self, slot: int) -> None:
        """The last reference is gone: the slot may be evicted."""
        self._idle.add(slot)
        self._queue.park(slot, self.worth(slot))

    def wake(self, slot: int) -> None:
        """Somebody resumes from the slot: it may not be evicted."""
        self._idle.remove(slot)
        self._uses[slot] += 1
        self._queue.remove(slot)

    def victim(self) -> int | None:
        """The checkpoint that `evict` would withdraw."""
        return self._queue.victim()

    def evict(self) -> tuple[int, tuple[Lineage, int]] | None:
        """Withdraw the idle checkpoint to evict first. Returns it and its `origin`; None if there is none."""
        if (slot := self._queue.evict()) is None:
            return None
        origin = self.origin(slot)
        self.forget(slot)
        return slot, origin

    def covered(self) -> Iterator[Hashable]:
        """Keys of all blocks that published states need, each once."""
        return self._tree.keys()

    def _cover_own(self, change: int, node: Node) -> None:
        start, stop = node.own
        if start < stop:
            self._cover(change, node.lineage, start, stop)

    def _revalue(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            if node.slot is not None and node.slot in self._idle:
                self._queue.revalue(node.slot, self.worth(node.slot))

    def check(self) -> None:
        """Verify that maps, tree and queue agree; changes nothing, raises AssertionError."""
        by_slot = {slot: node.slot for slot, node in self._checkpoints.items()}
        assert all(slot == held for slot, held in by_slot.items()), "the maps disagree"
        assert {self.find(node.key) for node in self._checkpoints.values()} == by_slot.keys(), (
            "a key finds another slot"
        )
        assert self._idle <= self._checkpoints.keys(), "an idle slot is not published"
        assert self._uses.keys() <= self._checkpoints.keys(), "uses of a slot that is gone"
        assert (self._queue.victim() is None) == (not self._idle), "the queue lost an idle slot"
        self._tree.check()
