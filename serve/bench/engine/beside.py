"""What requests that decode feel of a request that loads its context instead of computing it."""

import time
from collections.abc import Callable
from typing import Any

from serve.bench.engine.engine import BenchEngine
from serve.bench.engine.plan import Plan
from serve.bench.engine.step_clock import StepClock, summary_ms

TIMES = 3


def beside(engine: BenchEngine, plan: Plan, ask: Callable[[], str]) -> dict[str, Any]:
    """Inter-token latencies of requests that decode, alone and beside what `ask` queues."""
    deadline = time.perf_counter() + 3 * plan.budget_s
    decoders = engine.fill(plan.decoder_context, plan.decoders, growth=1024)
    StepClock().run(engine.step, plan.warmup, deadline)
    engine.make_noise()
    clocks = {"itl_undisturbed": StepClock(), "itl_beside_loads": StepClock()}
    for _ in range(TIMES):  # by turns, for the host is not always as fast
        for what, clock in clocks.items():
            clock.pause()
            name = ask() if what == "itl_beside_loads" else ""
            clock.run(engine.step, plan.steps, deadline)
            while name in engine.held and time.perf_counter() < deadline:
                clock.run(engine.step, 1, deadline)
    return {
        "running_decoders": len(decoders),
        **{what: summary_ms(clock.inter_token_latencies(decoders)) for what, clock in clocks.items()},
        "mean_ms": {
            what: round(1e3 * sum(found) / len(found), 4)
            for what, clock in clocks.items()
            if (found := clock.inter_token_latencies(decoders))
        },
    }
