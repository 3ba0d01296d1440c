"""What a state that is not finite has spoiled: found along reads and writes of the steps in flight.

A step is reported after later ones were scheduled. By then others may have resumed from a sick state and published
what they made of it, and a sick state may have been copied to host memory, or overwritten by a healthy one.

Pure on purpose: slots are integers. No vLLM, no torch.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Access:
    """What a step does to states for one request.

    Attributes:
        first: Number of tokens computed before the step.
        end: Number of tokens computed after it.
        read: Slot that holds the state after `first` tokens; the null slot if there are none.
        written: Slots that the step writes.
        preemptions: How often the request had been preempted before.
        hashes: Keys of the request's blocks in order, by which its pages are found.
    """

    first: int
    end: int
    read: int
    written: tuple[int, ...]
    preemptions: int
    hashes: Sequence[Any]


@dataclass(slots=True)
class Step:
    """A step that was sent to the workers.

    Attributes:
        moves: Copies ``(source, target)`` between slots, made in order before the step.
        accesses: By request.
        spoiled: Requests whose result in this step is already known to come from a sick state.
    """

    moves: Sequence[tuple[int, int]]
    accesses: dict[str, Access]
    spoiled: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Spread:
    """How far a sick state has come.

    Attributes:
        origins: Requests that the reported step made sick.
        victims: Requests that read what they had written, in a later step.
        slots: Slots that hold a sick state once all steps in flight are done.
        tokens: By request the tokens ``(first, end)`` of which pages may be sick.
    """

    origins: set[str]
    victims: set[str]
    slots: set[int]
    tokens: dict[str, tuple[int, int]]


def spread(reported: Iterable[int], steps: Sequence[Step]) -> Spread:
    """Follow sick states through the steps in flight, and note in those which requests they spoil.

    Args:
        reported: Slots that the first of `steps` left with NaN or infinity in them.
        steps: The reported step and all later ones, in the order in which workers run them.
    """
    slots, tokens = set(reported), dict[str, tuple[int, int]]()
    origins: set[str] = set()
    victims: set[str] = set()
    for number, step in enumerate(steps):
        if number == 0:
            hit = {name for name, access in step.accesses.items() if not slots.isdisjoint(access.written)}
            origins = hit - step.spoiled
        else:
            for source, target in step.moves:
                (slots.add if source in slots else slots.discard)(target)
            # All read before any writes.
            hit = {name for name, access in step.accesses.items() if access.read in slots}
            for name, access in step.accesses.items():
                (slots.update if name in hit else slots.difference_update)(access.written)
            victims |= hit - step.spoiled
            step.spoiled |= hit
        for name in hit:
            access = step.accesses[name]
            first, end = tokens.get(name, (access.first, access.end))
            tokens[name] = min(first, access.first), max(end, access.end)
    return Spread(origins, victims - origins, slots, tokens)
