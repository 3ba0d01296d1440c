"""When tokens arrived on the host, and what follows from it.

A token that is there is a step that is done: no other synchronisation is needed, and none is added.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` (0 to 1) of the values lie, interpolated linearly; NaN of no values."""
    return float(np.quantile(values, share)) if values else math.nan


def summary_ms(seconds: Sequence[float]) -> dict[str, float]:
    """Percentiles of durations, in milliseconds, and how many there were."""
    shares = {"p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {
        **{f"{name}_ms": round(percentile(seconds, share) * 1e3, 4) for name, share in shares.items()},
        "count": len(seconds),
    }


@dataclass(slots=True)
class StepClock:
    """Arrivals of tokens, step by step."""

    # time in seconds, and tokens by request, of every step that brought any; none of either where it was paused
    arrivals: list[tuple[float, dict[str, int]]] = field(default_factory=list)

    def run(self, step: Callable[[], tuple[float, dict[str, int]]], count: int, deadline: float) -> None:
        """Step until `count` more steps have brought tokens, or until the time `deadline` in seconds."""
        wanted = len(self.arrivals) + count
        while len(self.arrivals) < wanted:
            now, tokens = step()
            if tokens:
                self.arrivals.append((now, tokens))
            if now > deadline:
                return

    def pause(self) -> None:
        """What passes from now to the next step is not counted: others run meanwhile."""
        self.arrivals.append((math.nan, {}))

    def intervals(self) -> list[float]:
        """Seconds between successive steps with tokens."""
        return [later - earlier for (earlier, one), (later, other) in pairwise(self.arrivals) if one and other]

    def inter_token_latencies(self, requests: Iterable[str]) -> list[float]:
        """Seconds between successive tokens of the same request, for all of these requests."""
        watched, last, found = set(requests), dict[str, float](), list[float]()
        for now, tokens in self.arrivals:
            if not tokens:
                last = {}
            for request in watched & tokens.keys():
                if request in last:
                    found.append(now - last[request])
                last[request] = now
        return found
