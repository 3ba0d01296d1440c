"""Samples a server's `/metrics` beside a load test: requests, tokens, cache hits, states and blocks; and its memory."""

import threading
import time
from contextlib import suppress
from typing import Self

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

Sample = dict[str, float]
# Gauges and counters that the report draws or the progress needs; engines of one server are added up.
WANTED = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:kv_cache_usage_perc": "kv_usage",
    "vllm:prompt_tokens_total": "prompt_tokens",
    "vllm:generation_tokens_total": "output_tokens",
    "vllm:request_success_total": "finished",
    "vllm:num_preemptions_total": "preemptions",
    "vllm:prefix_cache_queries_total": "prefix_queries",
    "vllm:prefix_cache_hits_total": "prefix_hits",
    "kimi_state_hit_tokens_total": "state_hit_tokens",
    "kimi_state_miss_tokens_total": "state_miss_tokens",
    "kimi_state_evictions_total": "evictions",
}
BY_KIND = {"kimi_state_slots": "slots", "kimi_state_blocks": "blocks"}


def parse(text: str) -> Sample:
    """The wanted numbers of one scrape, by short names; states and blocks as `slots_live`, `blocks_page` and so on."""
    found: Sample = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = WANTED.get(sample.name)
            if sample.name in BY_KIND:
                name = f"{BY_KIND[sample.name]}_{sample.labels['kind']}"
            if name:
                found[name] = found.get(name, 0.0) + sample.value
    return found


def resident_bytes(pid: int) -> int:
    """Resident memory of a process and all that it started, in bytes; pages that two of them share count twice."""
    total = 0
    root = psutil.Process(pid)
    for process in [root, *root.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):  # ended since it was listed
            total += process.memory_info().rss
    return total


class Scraper:
    """A thread that samples until it is stopped.

    Attributes:
        samples: each with `t`, seconds since the start of the load test.
    """

    def __init__(self, url: str, every_seconds: float = 0.5, pid: int | None = None) -> None:
        """Describe a scraper; entering it starts it.

        Args:
            every_seconds: between two samples.
            pid: The server's process, if its memory is to be sampled too, as `rss_bytes`.
        """
        self._url, self._every, self._pid = f"{url.rstrip('/')}/metrics", every_seconds, pid
        self.samples: list[Sample] = []
        self._start = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *reason: object) -> None:
        """Stop after a last sample."""
        self._stop.set()
        self._thread.join(10)

    @property
    def now(self) -> float:
        """Seconds since the start of the load test."""
        return time.monotonic() - self._start

    def latest(self, name: str) -> float:
        """The newest value; 0 before there is one."""
        return self.samples[-1].get(name, 0.0) if self.samples else 0.0

    def _run(self) -> None:
        with httpx.Client(timeout=5) as client:
            while True:
                last = self._stop.wait(self._every)
                # A busy server may skip a beat; what is missing is a gap in the picture, not an error.
                with suppress(httpx.HTTPError, psutil.NoSuchProcess):
                    text = client.get(self._url).raise_for_status().text
                    memory = {"rss_bytes": float(resident_bytes(self._pid))} if self._pid else {}
                    self.samples.append({"t": round(self.now, 2), **parse(text), **memory})
                if last:
                    return
