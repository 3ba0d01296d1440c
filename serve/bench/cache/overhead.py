"""What the state cache costs the CPU in a step: our methods in the scheduler, and the metadata of a step.

The pool of blocks is ours too, with all that vLLM's would do for pages.

vLLM's real scheduler runs without a model, with 256 requests. A stopwatch charges every moment to whoever is running,
us or vLLM; its own cost, some tenths of a microsecond per call, is charged to us.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter_ns
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.sched.scheduler import Scheduler

from kimi_vllm.cache import scheduler as our_module
from kimi_vllm.cache.arena import ArenaPool
from kimi_vllm.cache.manager import KDAStateManager, KDAStateSpec
from kimi_vllm.cache.metadata import KDAMetadataBuilder
from serve.bench.cache.replay import STATE_BLOCKS, Memory, make_request, our_scheduler, step
from serve.bench.cache.traces import BLOCK, VOCABULARY
from serve.common.rows import Row
from serve.common.tables import ResultTable

REQUESTS = 256
LONG = 32 * 1024
OUR_SCHEDULING = ("schedule", "update_from_output", "make_stats")


@dataclass(frozen=True, slots=True)
class Overhead:
    """Microseconds: of `what`, the median and the 90th percentile over the steps; `limit` is what we aim for."""

    what: str
    case: str
    median_us: float
    p90_us: float
    limit_us: float | None = None


class Stopwatch:
    """Charges time to whoever was entered last and has not returned."""

    def __init__(self) -> None:
        self.spent = {"ours": 0, "vllm": 0}
        self._stack = ["vllm"]
        self._since = perf_counter_ns()

    def _switch(self) -> None:
        now = perf_counter_ns()
        self.spent[self._stack[-1]] += now - self._since
        self._since = now

    def charged(self, who: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, on this account."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self._switch()
            self._stack.append(who)
            try:
                return function(*args, **kwargs)
            finally:
                self._switch()
                self._stack.pop()

        return run

    def take(self) -> dict[str, int]:
        """Nanoseconds by account since the last call."""
        self._switch()
        spent, self.spent = self.spent, {"ours": 0, "vllm": 0}
        return spent


@contextmanager
def _watched(watch: Stopwatch) -> Iterator[None]:
    manager = [name for name in vars(KDAStateManager) if not name.startswith("_")]
    entries: list[tuple[type, str, str]] = [(KDAStateManager, name, "ours") for name in manager]
    entries += [(ArenaPool, name, "ours") for name in vars(ArenaPool) if not name.startswith("_")]
    entries += [(our_module._StateScheduling, name, "ours") for name in OUR_SCHEDULING]
    entries += [(Scheduler, name, "vllm") for name in OUR_SCHEDULING]
    before = []
    for owner, name, who in entries:
        found = vars(owner)[name]
        if not isinstance(found, FunctionType) and not isinstance(found, classmethod):
            continue
        before.append((owner, name, found))
        timed = watch.charged(who, found.__func__ if isinstance(found, classmethod) else found)
        setattr(owner, name, classmethod(timed) if isinstance(found, classmethod) else timed)
    try:
        yield
    finally:
        for owner, name, found in before:
            setattr(owner, name, found)


def scheduler_rows(steps: int = 400) -> Iterator[Overhead]:
    """Our share of a step with 256 requests: all decoding; and with a prompt of 32K tokens arriving every few steps."""
    for case, every in (("256 decoding", 0), ("256, a 32K prompt every 8 steps", 8)):
        samples = _run(steps, every)
        ours = [spent["ours"] / 1e3 / count for spent, count in samples]
        whole = [(spent["ours"] + spent["vllm"]) / 1e3 / count for spent, count in samples]
        yield Overhead("ours, per request-step", case, *quantiles(ours), limit_us=25)
        yield Overhead("whole scheduler, per request-step", case, *quantiles(whole))


def _run(steps: int, every: int) -> list[tuple[dict[str, int], int]]:
    draw = random.Random(0)
    pages = REQUESTS * (2048 // BLOCK) + (steps + 8) * LONG // BLOCK
    scheduler = our_scheduler(Memory(REQUESTS, pages + 4 * REQUESTS * STATE_BLOCKS, longest=2 * LONG))
    answers: dict[str, list[int]] = {}

    def arrive(length: int, num_answer: int) -> None:
        name = str(len(answers))
        answers[name] = draw.choices(VOCABULARY, k=num_answer)
        scheduler.add_request(make_request(scheduler, name, draw.choices(VOCABULARY, k=length), num_answer))

    long = 1 if every else 0
    for _ in range(REQUESTS - long):
        arrive(draw.randint(65, 512), steps + REQUESTS)
    for _ in range(24):
        step(scheduler, answers)
    watch, samples = Stopwatch(), []
    with _watched(watch):
        for number in range(steps):
            if every and number % every == 0 and len(scheduler.requests) < REQUESTS:
                arrive(LONG, 2)
            watch.take()
            output = step(scheduler, answers)
            scheduler.make_stats()
            samples.append((watch.take(), len(output.num_scheduled_tokens)))
    return samples


def metadata_rows(steps: int = 1000) -> Iterator[Overhead]:
    """The metadata of a step with 256 requests, on CPU tensors."""
    spec = KDAStateSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
    name = "model.layers.0.kda_state"
    member = SimpleNamespace(home=SimpleNamespace(pool=SimpleNamespace(num_slots=1 + 4 * REQUESTS)))
    config: Any = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context={name: member}))
    builder = KDAMetadataBuilder(spec, [name], config, torch.device("cpu"))
    for case, lengths in (
        ("256 decoding", [1] * REQUESTS),
        ("252 decoding, 4 prompts", [1] * (REQUESTS - 4) + [2048] * 4),
    ):
        described = _step_of(lengths)
        times = []
        for _ in range(steps):
            start = perf_counter_ns()
            builder.build(0, described)
            times.append((perf_counter_ns() - start) / 1e3)
        yield Overhead("metadata build, per step", case, *quantiles(times), limit_us=100)


def _step_of(lengths: Sequence[int]) -> CommonAttentionMetadata:
    draw = random.Random(0)
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    seq_lens = [length + draw.randint(100, LONG - 4096) for length in lengths]
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        num_reqs=len(lengths),
        num_actual_tokens=sum(lengths),
        max_query_len=max(lengths),
        max_seq_len=max(seq_lens),
        block_table_tensor=torch.randint(1, 4 * REQUESTS, (len(lengths), LONG // BLOCK), dtype=torch.int32),
        slot_mapping=torch.zeros(sum(lengths), dtype=torch.int64),
    )


def quantiles(values: Sequence[float]) -> tuple[float, float]:
    """The median and the 90th percentile."""
    ordered = sorted(values)
    return ordered[len(ordered) // 2], ordered[int(len(ordered) * 0.9)]


def report(found: Sequence[Overhead], env: Row) -> None:
    """Print a table."""
    cells = [
        [
            *(row.what, row.case),
            *(f"{us:,.2f}" for us in (row.median_us, row.p90_us)),
            "" if row.limit_us is None else f"{row.limit_us:g}",
        ]
        for row in found
    ]
    title = f"{env['device']}, {env['cores']} cores, {env['vllm']}, commit {env['commit']}"
    ResultTable(title, ["what", "case", "median us", "p90 us", "at most"], cells, words=2).show()
