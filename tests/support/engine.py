"""Answers that must be equal, prompts, and slots that a broken request left behind; engines are `serve.common`'s."""

import random
from collections.abc import Sequence
from typing import Any

import torch

from serve.common.engine import RECALL, Completion, Engine, engine, engines

__all__ = [
    "RECALL",
    "Completion",
    "Engine",
    "check_cold",
    "check_equal",
    "engine",
    "engines",
    "poison",
    "random_prompts",
]


def check_equal(completion: Completion, plain: Completion) -> None:
    """The same tokens, and log-probabilities to 1e-3, as a run that started at the prompt's first token."""
    assert plain.cached == 0
    assert completion.tokens == plain.tokens, f"{len(completion.prompt)} tokens, {completion.cached} cached"
    assert all(abs(ours - theirs) <= 1e-3 for ours, theirs in zip(completion.logprobs, plain.logprobs, strict=True))


def check_cold(running: Engine, completions: Sequence[Completion]) -> None:
    """The same prompts, computed from their first token in the same engine, have the same answers."""
    for completion in completions:
        [cold] = running.complete(
            [completion.prompt], max_tokens=len(completion.tokens), skip_reading_prefix_cache=True
        )
        check_equal(completion, cold)


def random_prompts(lengths: Sequence[int], vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Prompts of random tokens, specials excluded."""
    rng = random.Random(seed)
    return [[rng.randrange(3, vocab_size) for _ in range(length)] for length in lengths]


def poison(pool: Any, slots: Sequence[int]) -> None:
    """Fill slots with NaN, as a broken request might leave them."""
    index = torch.tensor(list(slots))
    pool.state[index] = torch.nan
    pool.conv[index] = torch.nan
