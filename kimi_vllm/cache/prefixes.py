"""Finds known prefixes of a sequence, and known sequences that continue one, without looking at every block.

The key of a block stands for everything up to the end of the block. So the point where two sequences diverge is found
by bisection, and known sequences form a tree whose nodes are their ends and the points where they diverge. The longest
known prefix is found from above, along the bits of its length.

Pure: slots are integers, keys are opaque. No vLLM, no torch.
"""

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

Lineage = Sequence[Hashable]
"""Keys of a sequence's blocks in order; each stands for everything up to the end of its block, as vLLM's hashes do."""


@dataclass(slots=True, eq=False)
class Node:
    """A prefix of `length` blocks: held by `slot`, or with ``slot=None`` one at whose end others diverge.

    Attributes:
        steps: Keys under which the search for the longest prefix passes here.
        children: Continuations, by the first key after this prefix.
    """

    lineage: Lineage
    length: int
    parent: "Node | None" = None
    slot: int | None = None
    steps: tuple[Hashable, ...] = ()
    children: dict[Hashable, "Node"] = field(default_factory=dict)

    @property
    def key(self) -> Hashable:
        """The key that stands for the whole prefix."""
        return self.lineage[self.length - 1]

    @property
    def own(self) -> tuple[int, int]:
        """From where to where the blocks are that no other known prefix has; none where others continue it."""
        assert self.parent is not None
        return (self.length if self.children else self.parent.length), self.length

    def ancestor(self) -> "Node | None":
        """The longest known prefix of this one that is shorter."""
        node = self.parent
        while node is not None and node.slot is None:
            node = node.parent
        return node

    def neighbours(self) -> list["Node"]:
        """Those whose `own` blocks may change where this prefix comes or goes: its parent, and who parts from it."""
        assert self.parent is not None
        children = self.parent.children
        # Of more than two, the others keep the place where they part.
        return [self.parent, *(children.values() if len(children) < 3 else ())]

    def heirs(self) -> Iterator["Node"]:
        """Known sequences whose `ancestor` is this one, or would be if it were known."""
        waiting = list(self.children.values())
        while waiting:
            node = waiting.pop()
            if node.slot is None:
                waiting += node.children.values()
            else:
                yield node


class PrefixTree:
    """Prefixes, each known as the content of one slot.

    A place where others part may keep the keys of a sequence that is gone; there are fewer such places than slots.
    """

    def __init__(self) -> None:
        self._root = Node((), 0)
        self._known: dict[Hashable, Node] = {}
        self._steps: Counter[Hashable] = Counter()

    def find(self, key: Hashable) -> Node | None:
        """The known prefix that `key` stands for."""
        return self._known.get(key)

    def longest(self, lineage: Lineage, limit: int) -> Node | None:
        """The longest known prefix of at most `limit` blocks of `lineage`."""
        length = self._longest(lineage, limit, 0, limit.bit_length())
        return self._known[lineage[length - 1]] if length else None

    def _longest(self, lineage: Lineage, limit: int, base: int, bits: int) -> int:
        # Among lengths whose leading bits are those of `base`, longer ones first. A step that nobody left a key at is
        # on nobody's way; one that somebody did may lead to a sequence that has parted from ours since.
        for bit in range(bits - 1, -1, -1):
            length = base + (1 << bit)
            on_a_way = length <= limit and lineage[length - 1] in self._steps
            if on_a_way and (found := self._longest(lineage, limit, length, bit)):
                return found
        return base if base and lineage[base - 1] in self._known else 0

    def add(self, slot: int, lineage: Lineage, length: int) -> Node:
        """Know the first `length` blocks of `lineage`, which may only grow from now on; not known before."""
        above = self.longest(lineage, length - 1) or self._root
        while above.length < length and (below := above.children.get(lineage[above.length])) is not None:
            common = _common(below.lineage, lineage, above.length + 1, min(below.length, length))
            above = below if common == below.length else self._part(above, below, common)
        node = above
        if above.length < length:
            node = above.children[lineage[above.length]] = Node(lineage, length, above)
        node.lineage, node.slot = lineage, slot
        node.steps = tuple(lineage[step - 1] for step in _steps(length))
        self._steps.update(node.steps)
        self._known[node.key] = node
        return node

    def remove(self, node: Node) -> None:
        """Know the prefix no more."""
        del self._known[node.key]
        for key in node.steps:
            self._steps[key] -= 1
            if not self._steps[key]:
                del self._steps[key]
        gone, node.slot, node.steps = node.lineage, None, ()
        while node.slot is None and node.parent is not None:
            parent, first = node.parent, node.lineage[node.parent.length]
            if len(node.children) > 1:
                if node.lineage is gone:  # those who part here need its keys, but nobody needs all of them
                    node.lineage = next(iter(node.children.values())).lineage
                return
            for child in node.children.values():
                parent.children[first], child.parent = child, parent
                return
            del parent.children[first]
            node = parent

    def keys(self) -> Iterator[Hashable]:
        """Keys of all blocks of known prefixes, each once."""
        waiting = list(self._root.children.values())
        for node in waiting:
            waiting += node.children.values()
            assert node.parent is not None
            yield from node.lineage[node.parent.length : node.length]

    @staticmethod
    def _part(above: Node, below: Node, length: int) -> Node:
        middle = Node(below.lineage, length, above)
        above.children[below.lineage[above.length]] = below.parent = middle
        middle.children[below.lineage[length]] = below
        return middle

    def check(self) -> None:
        """Verify the tree against its definition; raises AssertionError."""
        reached = list(self._root.heirs())
        for node in reached:
            reached += node.heirs()
            known = (self._known.get(key) for key in list(node.lineage[: node.length - 1])[::-1])
            assert node.ancestor() is next((n for n in known if n is not None), None), "not the nearest ancestor"
        assert {node.key: node for node in reached} == self._known, "the tree lost a prefix"
        assert self._steps == Counter(key for node in reached for key in node.steps), "a step is left behind"
        waiting = list(self._root.children.values())
        for node in waiting:
            waiting += node.children.values()
            assert node.slot is not None or len(node.children) > 1, "a place where nobody parts"


def _steps(length: int) -> Iterator[int]:
    """Lengths on the way up to `length`: its bits, one more at a time, from the last."""
    while length:
        yield length
        length &= length - 1


def _common(one: Lineage, other: Lineage, low: int, high: int) -> int:
    """How many blocks two sequences share, of `low`, which they do, to `high`."""
    while low < high:
        middle = (low + high + 1) // 2
        if one[middle - 1] == other[middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low
