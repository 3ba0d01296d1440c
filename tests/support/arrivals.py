"""Random schedules: what arrives when and what is aborted. Prompts are made of few texts, so that prefixes coincide."""

from dataclasses import dataclass, replace

from hypothesis import strategies as st

from support.engine import random_prompts

BLOCK = 64
LONGEST_ANSWER = 48
# Two texts for each of four blocks, so that prompts share prefixes and part at boundaries, and a tail for all.
BLOCKS = [random_prompts([BLOCK, BLOCK], 100, seed=40 + level) for level in range(4)]
[TAIL] = random_prompts([BLOCK], 100, seed=44)
TAILS = (0, 1, 2, 40, BLOCK - 1)


@dataclass(frozen=True)
class Arrival:
    """A request of a schedule; `texts` chooses its blocks, steps count from the start of its round."""

    texts: tuple[int, ...]
    tail: int
    max_tokens: int
    step: int
    abort_after: int | None
    priority: int

    @property
    def prompt(self) -> list[int]:
        stem = [token for level, text in zip(BLOCKS, self.texts, strict=False) for token in level[text]]
        return [*stem, *TAIL[: self.tail]] or TAIL[:1]


arrivals = st.builds(
    Arrival,
    texts=st.lists(st.integers(0, 1), max_size=len(BLOCKS)).map(tuple),
    tail=st.sampled_from(TAILS),
    max_tokens=st.sampled_from([1, 2, 5, 12, LONGEST_ANSWER]),
    step=st.integers(0, 12),
    abort_after=st.none() | st.none() | st.none() | st.integers(0, 20),
    priority=st.integers(0, 2),
)
rounds = st.tuples(st.lists(arrivals, min_size=3, max_size=4), st.lists(arrivals, max_size=3))
related = st.sampled_from([(0, 0), (0, 0, 0), (0, 0, 1), (0, 0, 0, 1)])
bursts = st.lists(st.builds(replace, arrivals, step=st.integers(0, 2), texts=related), min_size=4, max_size=6)
"""Many requests of almost the same time and text."""
