"""What ways to lay out one memory for states and pages lose, under requests that come and go.

Pure counting, at the sizes of the 48B model; no vLLM. A queue that is never empty is admitted first come first served
while it fits. A running request takes a page per 64 tokens it writes and gives all back at its end; who cannot grow
preempts the youngest. The bound is exact fit: a request runs if its bytes are free, wherever they lie.
"""

import heapq
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import log

from kimi_vllm.cache.manager import GROWING
from serve.bench.cache.replay import ALIGN_BLOCK, BLOCK_BYTES, STATE_BLOCKS, STATE_BYTES
from serve.bench.cache.traces import BLOCK
from serve.common.rows import Row
from serve.common.tables import ResultTable

TOTAL = 34 * 2**30
"""Bytes: one H200 with weights in bfloat16, at 0.92."""
DIVIDED = 298, 38_236
"""Slots for requests, and pages, where this memory was divided at start for 1024 sequences of up to 128K tokens."""
WARM_UP = 6
"""Of this many parts of a trace, the first is not counted."""


def pages_of(tokens: int) -> int:
    """Pages of 64 tokens."""
    return -(-tokens // BLOCK)


class Counted:
    """No place matters: states of `state` and pages of `page` out of `free`; `reserve` is left per running request."""

    def __init__(self, free: int, state: int, page: int = 1, reserve: float = 0) -> None:
        self.free, self.state, self.page, self.reserve = free, state, page, reserve
        self.held: dict[int, int] = {}

    def size(self, pages: int) -> int:
        """What a request with so many pages takes."""
        return self.state + pages * self.page

    def admit(self, who: int, pages: int) -> bool:
        """Take memory for a request; False, and nothing happened, if there is too little."""
        if self.size(pages) + self.reserve * len(self.held) > self.free:
            return False
        self.free -= self.size(pages)
        self.held[who] = pages
        return True

    def grow(self, who: int) -> bool:
        """Take a page more, if there is one."""
        more = self.size(self.held[who] + 1) - self.size(self.held[who])
        if more > self.free:
            return False
        self.free -= more
        self.held[who] += 1
        return True

    def release(self, who: int) -> None:
        """Give all back."""
        self.free += self.size(self.held.pop(who))


class InTree(Counted):
    """vLLM's own: blocks of 1920 tokens, three of which are a state."""

    def __init__(self) -> None:
        per_block = ALIGN_BLOCK // BLOCK
        super().__init__(TOTAL // (per_block * BLOCK_BYTES), state=3)
        self._per_block = per_block

    def size(self, pages: int) -> int:
        """What a request with so many pages of 64 tokens takes."""
        return self.state + -(-pages // self._per_block)


class Divided(Counted):
    """Slots and pages in numbers fixed at start."""

    def __init__(self) -> None:
        self._slots, pages = DIVIDED
        super().__init__(pages, state=0)

    def admit(self, who: int, pages: int) -> bool:
        """Take a slot and pages."""
        return len(self.held) < self._slots and super().admit(who, pages)


EXACT = "exact fit"
PROVIDERS: dict[str, Callable[[], Counted]] = {
    EXACT: partial(Counted, TOTAL, STATE_BYTES, BLOCK_BYTES),
    "ours": partial(Counted, TOTAL // BLOCK_BYTES - 1, STATE_BLOCKS, reserve=1 / GROWING),  # beside the null block
    "in-tree": InTree,
    "divided": Divided,
}


@dataclass(frozen=True, slots=True)
class Job:
    """Tokens of a prompt and of its answer."""

    prompt: int
    answer: int


def lognormal(draw: random.Random) -> Iterator[Job]:
    """Prompts of 200 to 128K tokens."""
    while True:
        prompt = min(131_072, max(200, int(draw.lognormvariate(log(3000), 1.6))))
        yield Job(prompt, min(4096, max(16, int(draw.lognormvariate(log(300), 1.0)))))


def by_turns(draw: random.Random) -> Iterator[Job]:
    """Long documents for a while, then short chats, and again."""
    while True:
        for _ in range(250):
            yield Job(draw.randrange(32_768, 131_073), draw.randrange(64, 1024))
        for _ in range(2500):
            yield Job(draw.randrange(200, 3000), draw.randrange(64, 1024))


def reasoning(draw: random.Random) -> Iterator[Job]:
    """Short prompts with long answers: memory turns from states to pages as they grow."""
    while True:
        yield Job(draw.randrange(200, 4000), min(32_768, max(64, int(draw.lognormvariate(log(6000), 1.0)))))


def alike(tokens: int, draw: random.Random) -> Iterator[Job]:
    """Prompts of one length, give or take a fiftieth."""
    while True:
        yield Job(int(tokens * draw.uniform(0.98, 1.02)), draw.randrange(64, 1024))


TRACES: dict[str, tuple[Callable[[random.Random], Iterator[Job]], int]] = {
    "lognormal": (lognormal, 12_000),
    "by-turns": (by_turns, 12_000),
    "reasoning": (reasoning, 60_000),
    **{f"alike-{tokens}": (partial(alike, tokens), 6_000) for tokens in (1024, 4096, 32_768, 131_072)},
}
"""Requests, and ticks to run; a tick is a decode step, and prompts are there at once."""


@dataclass(frozen=True, slots=True)
class Fragmentation:
    """One way on one trace. `running` is a mean over time, `of_exact` its share of exact fit's."""

    trace: str
    provider: str
    ticks: int
    running: float
    of_exact: float
    finished: int
    preemptions: int


class _Run:
    """A trace on a memory, tick by tick."""

    def __init__(self, memory: Counted, jobs: Iterator[Job]) -> None:
        self._memory, self._jobs = memory, jobs
        self._queue: deque[Job] = deque()
        self.running: dict[int, tuple[Job, int]] = {}  # with the tick of admission; the youngest last
        self._events: list[tuple[int, int, bool]] = []  # tick, who, and whether it ends or needs a page
        self._names = self.finished = self.preemptions = 0

    def tick(self, now: int) -> None:
        """Let requests end and grow, and admit who fits."""
        while self._events and self._events[0][0] <= now:
            _, who, ends = heapq.heappop(self._events)
            if who in self.running and ends:
                self._drop(who)
                self.finished += 1
            while who in self.running and not self._memory.grow(who):
                self._preempt(now)
        while True:
            if not self._queue:
                self._queue.append(next(self._jobs))
            if not self._admit(self._queue[0], now):
                break
            self._queue.popleft()

    def _drop(self, who: int) -> None:
        self._memory.release(who)
        del self.running[who]

    def _preempt(self, now: int) -> None:
        youngest = next(reversed(self.running))
        job, since = self.running[youngest]
        self._drop(youngest)
        self.preemptions += 1
        done = min(job.answer, now - since)
        self._queue.appendleft(Job(job.prompt + done, max(1, job.answer - done)))

    def _admit(self, job: Job, now: int) -> bool:
        who, tokens = self._names, job.prompt + 1
        if not self._memory.admit(who, pages_of(tokens)):
            return False
        self._names += 1
        self.running[who] = job, now
        heapq.heappush(self._events, (now + job.answer, who, True))
        first = now + pages_of(tokens) * BLOCK - tokens + 1
        for at in range(first, now + job.answer, BLOCK):
            heapq.heappush(self._events, (at, who, False))
        return True


def run(provider: str, trace: str, ticks: int, seed: int) -> tuple[float, int, int]:
    """Run a trace; what happens in its first part is not counted.

    Returns:
        Mean of the requests that run, requests that ended, preemptions.
    """
    one, warm = _Run(PROVIDERS[provider](), TRACES[trace][0](random.Random(seed))), ticks // WARM_UP
    before, total = (0, 0), 0
    for now in range(ticks):
        if now == warm:
            before = one.finished, one.preemptions
        one.tick(now)
        total += len(one.running) * (now >= warm)
    return total / (ticks - warm), one.finished - before[0], one.preemptions - before[1]


def rows(traces: Sequence[str], ticks: int | None, seed: int) -> Iterator[Fragmentation]:
    """Every way on every trace."""
    for trace in traces:
        length, exact = ticks or TRACES[trace][1], 0.0
        for provider in PROVIDERS:
            running, finished, preemptions = run(provider, trace, length, seed)
            exact = exact or running
            share = round(running / exact, 4)
            yield Fragmentation(trace, provider, length, round(running, 2), share, finished, preemptions)


def report(found: Sequence[Fragmentation], env: Row) -> None:
    """Print a table."""
    cells = [
        [
            *(row.trace, row.provider, f"{row.running:,.1f}", f"{row.of_exact:.1%}"),
            *(f"{row.finished:,}", f"{row.preemptions:,}"),
        ]
        for row in found
    ]
    title = f"requests that run at once in {TOTAL / 2**30:.0f} GiB, counted; commit {env['commit']}"
    ResultTable(title, ["trace", "memory", "running", "of exact fit", "finished", "preempted"], cells, words=2).show()
