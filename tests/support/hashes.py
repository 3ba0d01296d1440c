"""A model without weights: a state is the hash of the prefix it stands for, and decides the next token."""

from collections.abc import Sequence
from itertools import accumulate

SICK = -(2**70)
"""What stands for NaN: no hash of a prefix."""
NONSENSE = 1
"""The token that is sampled from a sick state, and never from another."""


def after(state: int, token: int) -> int:
    """One step of the recurrence."""
    return hash((state, token))


def states(tokens: Sequence[int]) -> list[int]:
    """The state before the first token and after each."""
    return list(accumulate(tokens, after, initial=0))


def next_token(state: int) -> int:
    """What the model says in this state."""
    return 3 + state % 89


def answer(prompt: Sequence[int], length: int) -> list[int]:
    """What the model says to a prompt."""
    state, tokens = states(prompt)[-1], []
    for _ in range(length):
        tokens.append(next_token(state))
        state = after(state, tokens[-1])
    return tokens
