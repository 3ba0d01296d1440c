"""Drafts for the worker of hashes: some are right, some are wrong, and some are none, which vLLM calls -1."""

from collections.abc import Sequence
from random import Random

from support.hashes import NONSENSE, after, next_token


class Moods:
    """Stands in for `Drafting`: steps draft for a while, and then for a while do not, by a seed."""

    def __init__(self, seed: int = 0) -> None:
        self._random, self._wanted = Random(seed), True

    def wanted(self, can_draft: bool) -> bool:
        """Whether the next step is to draft: in most cases as the last one."""
        if can_draft and self._random.random() < 0.2:
            self._wanted = not self._wanted
        return self._wanted

    def saw(self, drafts: int, accepted: int) -> None:
        """Whatever became of them."""
        assert 0 <= accepted <= drafts


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
