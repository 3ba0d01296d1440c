"""How long a saved session takes to its next token, beside its prompt; and what requests that decode feel of it."""

import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kimi_vllm.options import KimiOptions
from serve.bench.engine.beside import beside
from serve.bench.engine.engine import BenchEngine
from serve.bench.engine.plan import Plan
from serve.bench.engine.step_clock import summary_ms

TIMES = 3


def resume(engine: BenchEngine, plan: Plan, prompt: int) -> dict[str, Any]:
    """Time to the first token of a prompt that is computed, and of its session and one token more.

    A session is loaded with its file in the page cache and without. At last it is loaded while others decode.
    """
    folder = Path(KimiOptions.of(engine.config).session_dir or "")
    tokens = engine.tokens(min(prompt, engine.max_model_len - 2))
    onward = [*tokens, tokens[0], tokens[1]]
    computed = [_first(engine, lambda: engine.add_tokens(tokens, 1)) for _ in range(TIMES + 1)][1:]

    before = Counter(engine.scheduler.connector.counts)
    _first(engine, lambda: engine.add_tokens(tokens, 1, save="bench"))
    saving = time.perf_counter()
    saved_s = _settle(engine) - saving
    [path] = folder.glob("bench.session")
    times: dict[str, list[float]] = {"resumed": [], "resumed_uncached": []}
    for name, seconds in times.items():
        for _ in range(TIMES + 1):
            if name == "resumed_uncached":
                _forget(path)
            seconds.append(_first(engine, lambda: engine.add_tokens(onward, 1, load="bench")))
        del seconds[0]
    next_to = beside(engine, plan, lambda: engine.add_tokens(onward, 1, load="bench"))
    counts = Counter(engine.scheduler.connector.counts) - before
    size = path.stat().st_size
    path.unlink()
    return {
        "context": "real",
        "file_bytes": size,
        "computed": summary_ms(computed),
        **{name: summary_ms(seconds) for name, seconds in times.items()},
        "saved_s": round(saved_s, 4),
        "sessions_resumed": counts["sessions_resumed"],
        "sessions_missed": counts["sessions_missed"],
        **next_to,
    }


def _first(engine: BenchEngine, add: Callable[[], str]) -> float:
    """Seconds until a request has its first token; it is over then, or goes on to its end."""
    started = time.perf_counter()
    name = add()
    while True:
        now, got = engine.step()
        if name in got:
            engine.finish()
            return now - started


def _settle(engine: BenchEngine) -> float:
    """Step until what ended has been written; when that was."""
    while engine.scheduler.has_requests():
        engine.step()
    return time.perf_counter()


def _forget(path: Path) -> None:
    """Take a file out of the page cache. It must be on disk, as a saved session is."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
