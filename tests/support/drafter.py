"""Drafts for the worker of hashes: some are right, some are wrong, and some are none, which vLLM calls -1."""

from collections.abc import Sequence
from random import Random

from support.hashes import NONSENSE, after, next_token


class Drafter:
    """Proposes so many tokens after a state, by a seed; `luck` are chances that one is right."""

    def __init__(self, most: int, seed: int = 0, *, least: int = 0, luck: Sequence[float] = (0, 0.5, 0.9, 1)) -> None:
        self._least, self._most, self._random, self._luck = least, most, Random(seed), luck

    def propose(self, state: int) -> list[int]:
        """Drafts behind the last token that is known, of which the model would say none, some or all."""
        luck, drafts = self._random.choice(self._luck), []
        for _ in range(self._random.randint(self._least, self._most)):
            right = next_token(state)
            wrong = self._random.choice([-1, NONSENSE, 3 + (right + 1) % 89])
            drafts.append(right if self._random.random() < luck else wrong)
            state = after(state, drafts[-1])
        return drafts
