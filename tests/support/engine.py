"""Engines that complete prompts, answers that must be equal, and slots that a broken request left behind."""

import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from serve.common import engine as common
from serve.common.paths import RECALL as RECALL
from support.memory import Watch

DRAFTS = int(os.environ.get("KIMI_TEST_DRAFTS", "0"))
"""Tokens that every engine drafts, except those called `PLAIN`."""

STATE_BLOCKS = 10 if DRAFTS == 3 else 8
"""Blocks of 64 tokens that a state of the recall model takes, in float32 on a CPU."""

PLAIN = "plain"
"""Name of an engine that others are compared with."""

BLOCKS = 1000
"""Blocks of an engine in tests, unless it is told otherwise."""


@dataclass(frozen=True)
class Completion:
    """One greedy answer; `cached` is how many prompt tokens came from the prefix cache."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    cached: int


class Engine(common.Engine):
    """One that answers token ids with token ids, and whose memory is watched.

    Attributes:
        watch: None for a model without states.
    """

    def __init__(self, checkpoint: Path | str, **options: Any) -> None:
        from vllm.compilation.monitor import set_cudagraph_capturing_enabled

        # vLLM's first model runner leaves it off in its process, and the second does not switch it on again.
        set_cudagraph_capturing_enabled(True)
        super().__init__(checkpoint, **options)
        self.watch = Watch(self) if hasattr(self.scheduler, "check_memory") else None

    def complete(self, prompts: Sequence[Sequence[int]], max_tokens: int = 8, **sampling: Any) -> list[Completion]:
        """Answer prompts of token ids greedily, all at once, and check that every slot came back."""
        from vllm import SamplingParams, TokensPrompt

        parameters = SamplingParams(
            temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=0, detokenize=False, **sampling
        )
        inputs = [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts]
        outputs = self.llm.generate(inputs, parameters, use_tqdm=False)
        # With a connector, blocks come back when they are saved, and when a step in flight has written them.
        while self.scheduler.requests or self.scheduler.deferred_frees:
            self.llm.llm_engine.step()
        self.check_idle()
        return [completion(output) for output in outputs]


def completion(output: Any) -> Completion:
    """What vLLM answers to a prompt of token ids, with log-probabilities of the tokens alone."""
    [answer] = output.outputs
    return Completion(
        prompt=list(output.prompt_token_ids),
        tokens=list(answer.token_ids),
        logprobs=[step[token].logprob for step, token in zip(answer.logprobs, answer.token_ids, strict=True)],
        cached=output.num_cached_tokens or 0,
    )


@contextmanager
def engine(checkpoint: Path, **options: Any) -> Iterator[Engine]:
    """See `serve.common.engine`."""
    with engines(checkpoint, {"": options}) as started:
        yield started[""]


@contextmanager
def engines(checkpoint: Path, configurations: Mapping[Any, Mapping[str, Any]]) -> Iterator[dict[Any, Engine]]:
    """See `serve.common.engine`; with little memory, whose every block is checked after every step.

    A test that takes ``VLLM_CPU_KVCACHE_SPACE`` out of the environment gets what the plugin asks vLLM for.
    """
    little: dict[str, Any] = {"num_gpu_blocks_override": BLOCKS} if "VLLM_CPU_KVCACHE_SPACE" in os.environ else {}
    drafts = {"speculative_config": ngram(DRAFTS)} if DRAFTS else {}
    given, configurations = (
        configurations,
        {name: little | (drafts if name != PLAIN else {}) | options for name, options in configurations.items()},
    )
    with common.engines(Engine, checkpoint, configurations) as started:
        for name, running in started.items():
            if "speculative_config" not in given[name]:
                running.scheduler._drafting = None  # most drafts of random tokens are wrong, and all are to be tried
        yield started


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


def ngram(drafts: int) -> dict[str, Any]:
    """Speculation at every step: most drafts of random tokens are wrong, and most of periodic answers right."""
    return {"method": "ngram", "num_speculative_tokens": drafts, "prompt_lookup_min": 1, "prompt_lookup_max": 4}


def poison(pool: Any, slots: Sequence[int]) -> None:
    """Fill slots with NaN, as a broken request might leave them."""
    for layer in pool.layers:
        for slot in slots:
            state, ring = layer.load(slot)
            layer.store(slot, torch.full_like(state, torch.nan), torch.full_like(ring, torch.nan))


def poison_blocks(pool: Any, blocks: Sequence[int]) -> None:
    """Fill blocks of memory with NaN, which an earlier owner might have left as states or as latents."""
    pool.memory[list(blocks)] = 0xFF  # NaN in every floating point format
