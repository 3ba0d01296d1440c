"""The same traces through a real engine on the tiny checkpoint: what was cached, and how long the first token took.

One request at a time, so that the time to the first token is that of its prompt alone. The answers are the model's, and
the turns that follow contain them. vLLM's own "align" is not here: its model cannot be built on vLLM's CPU package.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from vllm import LLM, SamplingParams, TokensPrompt

from serve.bench.cache.reuse import ALIGNED, FITS, THIRD, Workload
from serve.bench.cache.traces import Turn, prompt_of
from serve.common.engine import engine
from serve.common.paths import RECALL
from serve.common.rows import Row
from serve.common.tables import ResultTable

STATE_BLOCKS = 8
"""Blocks of a state of the tiny checkpoint."""

SHORT: dict[str, dict[str, int]] = {
    "chat": {"users": 4, "turns": 6, "limit": 2560},
    "agent": {"tasks": 3, "steps": 8, "limit": 2560},
    "rag": {"documents": 8, "requests": 24, "limit": 2560},
}
"""Sizes with which a trace takes a minute or two on two cores."""


@dataclass(frozen=True, slots=True)
class FirstToken:
    """One engine on one trace. `replayed` is what the replay without a model counts for `hit`."""

    trace: str
    memory: str
    policy: str
    turns: int
    prompt: int
    hit: int
    replayed: int
    ttft_mean_ms: float
    ttft_median_ms: float


def rows(names: Sequence[str], policies: Sequence[str], seed: int) -> Iterator[FirstToken]:
    """Every trace without a cache, with room for everything, and with a third of it under every policy."""
    for name in names:
        workload = Workload.of(name, seed, concurrency=1, **SHORT[name])
        runs = [("no cache", "-"), (FITS, "value"), *((THIRD, policy) for policy in policies if policy not in ALIGNED)]
        for regime, policy in runs:
            blocks = workload.memory(FITS if policy == "-" else regime, STATE_BLOCKS).blocks
            replayed = 0 if policy == "-" else workload.run(regime, policy, STATE_BLOCKS).hit
            hits, seconds = _serve(workload, blocks, None if policy == "-" else policy)
            yield FirstToken(
                trace=name,
                memory=regime,
                policy=policy,
                turns=len(workload.turns),
                prompt=sum(map(len, workload.prompts)),
                hit=sum(hits),
                replayed=replayed,
                ttft_mean_ms=round(mean(seconds) * 1e3, 2),
                ttft_median_ms=round(median(seconds) * 1e3, 2),
            )


def _serve(workload: Workload, blocks: int, eviction: str | None) -> tuple[list[int], list[float]]:
    options: dict[str, Any] = {
        "max_model_len": 8192,
        "max_num_seqs": 1,
        "max_num_batched_tokens": 8192,
        "num_gpu_blocks_override": blocks,
        "enable_prefix_caching": eviction is not None,
        "additional_config": {"kimi": {"eviction": eviction or "value"}},
    }
    with engine(RECALL, **options) as running:
        _ask(running.llm, Turn(None, [5] * 512, [0] * 2), [5] * 512, "warm-up")
        running.llm.reset_prefix_cache()
        return _play(running.llm, workload.turns)


def _play(llm: LLM, turns: Sequence[Turn]) -> tuple[list[int], list[float]]:
    answers: list[list[int]] = []
    hits, seconds = [], []
    for index, turn in enumerate(turns):
        answer, hit, first = _ask(llm, turn, prompt_of(turns, index, answers), str(index))
        answers.append(answer)
        hits.append(hit)
        seconds.append(first)
    return hits, seconds


def _ask(llm: LLM, turn: Turn, prompt: list[int], name: str) -> tuple[list[int], int, float]:
    engine, length = llm.llm_engine, len(turn.answer)
    start, first, last = time.perf_counter(), 0.0, None
    engine.add_request(
        name,
        TokensPrompt(prompt_token_ids=prompt),
        SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False),
    )
    while engine.has_unfinished_requests():
        for output in engine.step():
            if not first:
                first = time.perf_counter() - start
            last = output
    assert last is not None
    return list(last.outputs[0].token_ids), last.num_cached_tokens or 0, first


def report(found: Sequence[FirstToken], env: Row) -> None:
    """Print a table."""
    cells = [
        [
            *(row.trace, row.memory, row.policy),
            *(f"{number:,}" for number in (row.prompt, row.hit, row.replayed)),
            *(f"{ms:.1f}" for ms in (row.ttft_mean_ms, row.ttft_median_ms)),
        ]
        for row in found
    ]
    columns = ["trace", "state memory", "policy", "prompt tokens", "hit", "replay says", "mean TTFT ms", "median"]
    title = f"{env['device']}, {env['cores']} cores, {env['vllm']}, commit {env['commit']}"
    ResultTable(title, columns, cells, words=3).show()
