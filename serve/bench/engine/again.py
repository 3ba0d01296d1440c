"""Prompts that are asked a second time, when all of them have been asked: how much of each is still there.

What does not fit into the device's memory has gone elsewhere or is lost. With the same order both times, recency alone
keeps nothing of a working set that is larger than memory.
"""

import itertools
import time
from collections import Counter
from typing import Any

from serve.bench.engine.beside import beside
from serve.bench.engine.engine import BenchEngine
from serve.bench.engine.plan import Plan
from serve.bench.engine.step_clock import summary_ms

COUNTS = ("swaps_out", "swaps_in", "page_swaps_out", "page_swaps_in", "value_lost")
COUNTS += ("prefixes_saved", "prefixes_loaded", "prefixes_failed", "prefixes_skipped")


def again(engine: BenchEngine, plan: Plan, count: int, prompt: int) -> dict[str, Any]:
    """Time to the first token of `count` prompts, one at a time, and of the same ones again; then beside decodes.

    A prompt can be resumed at its last boundary before its last token.
    """
    prompts = [engine.distinct_tokens(number, min(prompt, engine.max_model_len - 2)) for number in range(count)]
    block = engine.facts["block_size"]
    reusable = sum((len(tokens) - 1) // block * block for tokens in prompts)
    _first(engine, engine.tokens(prompt))  # what a first prompt of this length waits for
    while engine.scheduler.requests:  # whose prefix is being saved
        engine.step()
    assert engine.scheduler.reset_prefix_cache()
    before, _ = zip(*(_first(engine, tokens) for tokens in prompts), strict=True)
    after, hits = zip(*(_first(engine, tokens) for tokens in prompts), strict=True)
    around = itertools.cycle(prompts)
    next_to = beside(engine, plan, lambda: engine.add_tokens(next(around), 1))
    counts = engine.scheduler._states.block_pool.counts if hasattr(engine.scheduler, "_states") else Counter()
    counts = counts + getattr(engine.scheduler.connector, "counts", Counter())
    return {
        "context": "real",
        "computed": summary_ms(before),
        "again": summary_ms(after),
        "mean_ms": {"computed": _mean_ms(before), "again": _mean_ms(after)} | next_to.pop("mean_ms"),
        "hit_share": round(sum(hits) / reusable, 4),
        "counts": {name: counts[name] for name in COUNTS if name in counts},
        **next_to,
    }


def _first(engine: BenchEngine, tokens: list[int]) -> tuple[float, int]:
    """Seconds until a request has its first token, and how many tokens it found in a cache."""
    started = time.perf_counter()
    name = engine.add_tokens(tokens, 2)
    stats = engine.scheduler.requests[name].prefill_stats
    while True:
        now, got = engine.step()
        if name in got:
            engine.finish()
            return now - started, int(stats.num_cached_tokens)


def _mean_ms(seconds: tuple[float, ...]) -> float:
    return round(1e3 * sum(seconds) / len(seconds), 4)
