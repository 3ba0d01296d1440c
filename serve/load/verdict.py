"""The verdict on a soak: no errors, the rate was kept, memory stayed, and in the end no state and no page is left.

Memory is what the server's processes have resident. Its growth is the median over the last tenth of the judged part
against the median over its first tenth; the parts before have filled caches and allocators, which is no leak.
"""

import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import httpx

from serve.load.record import Measured, Record, RecordError
from serve.load.scrape import Sample, parse

IDLE_SECONDS = 60
KEPT = 0.95  # of the arrivals per second; what is short of that waits ever longer
TENTH = 10
_HELD = ("slots_live", "slots_checkpoint", "blocks_page", "blocks_kept", "blocks_loose")


def check(name: str, found: str, limit: str, passed: bool) -> dict[str, Any]:
    """A condition: what must hold, what was seen, what was allowed, whether it held."""
    return {"name": name, "found": found, "limit": limit, "passed": passed}


def empty_cache(url: str) -> None:
    """Have a server without requests forget all prefixes, so that every state or page which stays is a leak.

    Raises:
        RecordError: the server does not offer that.
    """
    answer = httpx.post(f"{url}/reset_prefix_cache", timeout=30)
    if not answer.is_success:
        raise RecordError(
            "a soak ends with an empty prefix cache, to see that nothing stays: "
            f"start the server with VLLM_SERVER_DEV_MODE=1 (POST /reset_prefix_cache: {answer.status_code})"
        )


def drain(url: str, model: str) -> Sample:
    """Wait until no request is left, or a minute, empty the prefix cache, and return what /metrics says then."""
    with httpx.Client(base_url=url, timeout=30) as client:
        deadline = time.monotonic() + IDLE_SECONDS
        while (sample := parse(client.get("/metrics").text)).get("running") or sample.get("waiting"):
            if time.monotonic() > deadline:
                return sample
            time.sleep(0.5)
        empty_cache(url)
        # The gauges change with a step of the engine; a prompt of one token is too short to leave a state behind.
        body = {"model": model, "prompt": [1], "max_tokens": 1}
        client.post("/v1/completions", json=body).raise_for_status()
        time.sleep(1)
        return parse(client.get("/metrics").text)


def resident(samples: Sequence[Sample], part: Measured) -> tuple[float, float]:
    """Resident bytes in the first and in the last tenth of a part; zeros if it is too short to tell."""
    sizes = [sample["rss_bytes"] for sample in samples if part.started <= sample["t"] <= part.ended]
    few = len(sizes) // TENTH
    return (median(sizes[:few]), median(sizes[-few:])) if few else (0.0, 0.0)


def judge(record: Record, judged: str, allowed: float, end: Sample) -> list[dict[str, Any]]:
    """Hold a load test against what a soak must keep.

    Args:
        allowed: growth of memory, as a share.
        end: what `drain` returned.
    """
    errors = sum(int(point.get("failed") or 0) for point in record.points)
    unmeasured = [point.label for point in record.points if point.error]
    checks = [
        check("no errors", f"{errors} requests, {len(unmeasured)} points failed", "0", not errors + len(unmeasured))
    ]
    for point in record.points:
        if point.part != judged or point.error or not point.rate:
            continue
        reached = point.get("request_throughput") or 0.0
        limit = f"at least {KEPT:.0%} of {point.rate:g}/s"
        checks.append(check("the rate was kept", f"{reached:.3g}/s", limit, reached >= KEPT * point.rate))
        first, last = resident(record.samples, point)
        growth = last / first - 1 if first else float("nan")
        found = f"{growth:+.2%}, {first / 2**20:.0f} MiB to {last / 2**20:.0f} MiB"
        checks.append(check("memory stayed", found, f"{allowed:+.0%}", growth <= allowed))
    # Blocks of kind state may stay with slots that hold nothing.
    held = {name: value for name, value in end.items() if name in _HELD}
    found = ", ".join(f"{value:.0f} {name}" for name, value in held.items()) or "no metrics"
    checks.append(check("nothing stayed", found, "0", len(held) == len(_HELD) and not any(held.values())))
    return checks
