"""What a state that is not finite has spoiled: found along reads and writes of the steps in flight.

A step is reported after later ones were scheduled. By then others may have resumed from a sick state, or from pages
of keys and values that were computed from one, and published what they made of it; a sick state may have been copied
to host memory, or overwritten by a healthy one.

Pure: slots and pages are integers. No vLLM, no torch.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, cast

from kimi_vllm.cache.exchange import Operation


class Access(NamedTuple):
    """What a step does to the caches for one request.

    Attributes:
        read: Slot that holds the state before the step; the null slot if there is none.
        written: Slots that the step writes.
        pages: Tells the pages that the step reads, without those it writes, and those that it writes; called when
            something is sick only.
        preemptions: How often the request had been preempted before.
    """

    read: int
    written: tuple[int, ...]
    pages: Callable[[], tuple[set[int], set[int]]]
    preemptions: int


@dataclass(slots=True)
class Step:
    """A step that was sent to the workers.

    Attributes:
        operations: What is done before the step, in order (see `exchange.OPERATIONS`).
        accesses: By request.
        blameless: Requests that are not to blame for what this step made of them: they read what others had spoiled, or
            the step's result is not wanted.
    """

    operations: Sequence[Operation]
    accesses: dict[str, Access]
    blameless: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Spread:
    """How far a sick state has come, once all steps in flight are done.

    Attributes:
        origins: Requests that the reported step made sick, and how often each was preempted before it was sick last.
        victims: The same of requests that read what those had written.
        slots: Slots that hold a sick state.
        pages: Pages of which tokens may come from a sick state.
    """

    origins: dict[str, int]
    victims: dict[str, int]
    slots: set[int]
    pages: set[int]


def spread(reported: Iterable[int], steps: Sequence[Step]) -> Spread:
    """Follow sick states through the steps in flight, and note there whom they spoil.

    Args:
        reported: Slots that the first of `steps` left with NaN or infinity in them.
        steps: The reported step and all later ones, in the order in which workers run them.
    """
    slots, pages = set(reported), set[int]()
    origins: set[str] = set()
    sick: dict[str, int] = {}
    for number, step in enumerate(steps):
        touched = {name: access.pages() for name, access in step.accesses.items()}
        if number == 0:
            hit = {name for name, access in step.accesses.items() if not slots.isdisjoint(access.written)}
        else:
            for source, target in step.operations:
                if isinstance(source, list):
                    for one, other in zip(source, cast("list[int]", target), strict=True):
                        (pages.add if one in pages else pages.discard)(other)
                elif isinstance(target, int):
                    (slots.add if source in slots else slots.discard)(target)
                else:
                    slots.discard(source)  # other blocks, to be written before they are read
            hit = {name for name, access in step.accesses.items() if access.read in slots}
        infected = _infected(hit, touched, pages)
        if number == 0:
            origins = hit - infected - step.blameless
        hit |= infected
        # States are read before any is written, and a layer writes all of a step's pages before it reads any.
        for name, access in step.accesses.items():
            (slots.update if name in hit else slots.difference_update)(access.written)
            (pages.update if name in hit else pages.difference_update)(touched[name][1])
        step.blameless |= hit - origins if number == 0 else hit
        sick |= {name: step.accesses[name].preemptions for name in hit}
    return Spread(
        {name: count for name, count in sick.items() if name in origins},
        {name: count for name, count in sick.items() if name not in origins},
        slots,
        pages,
    )


def _infected(hit: set[str], touched: dict[str, tuple[set[int], set[int]]], pages: set[int]) -> set[str]:
    """Who reads a sick page: one of `pages`, or one that is written in this very step for somebody sick."""
    found: set[str] = set()
    while True:
        sick = pages.union(*(touched[name][1] for name in hit | found))
        more = {name for name, (read, _) in touched.items() if not read.isdisjoint(sick)} - found
        if not more:
            return found
        found |= more
