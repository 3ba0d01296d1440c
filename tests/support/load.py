"""Scenarios and records of load tests that never ran."""

from pathlib import Path
from typing import Any

from serve.load import record
from serve.load.generator import Target
from serve.load.scenario import points, read

TARGET = Target("http://127.0.0.1:1", "kimi", "some/folder")
CHAT = "parts: [{name: chat, workload: {kind: random, prompt: 64, output: 8}, concurrency: [2, 4]}]"


def scenario(folder: Path, text: str = CHAT, title: str = "title: Test\n") -> Path:
    """A scenario file."""
    path = folder / "scenario.yaml"
    path.write_text(title + text)
    return path


def result(scale: float = 1.0) -> dict[str, Any]:
    """Numbers as `vllm bench serve` writes them."""
    numbers = {"completed": 8, "failed": 0, "output_throughput": 100 * scale, "request_throughput": 3.0}
    for name in ("ttft", "tpot", "itl", "e2el"):
        numbers |= {f"p{percentile}_{name}_ms": percentile * scale for percentile in (50, 90, 99)}
    return numbers


def make_record(folder: Path, text: str = CHAT, scale: float = 1.0) -> record.Record:
    """A load test of a scenario, each of its points with `result`, times the scale and the users at once."""
    plan = read(scenario(folder, text))
    made = record.new(plan, TARGET, ["vllm", "serve", "x"])
    for point in points(plan):
        measured = record.measured(point, ["vllm", "bench", "serve", point.label], point.number, point.number + 1)
        measured.result = result(scale * (point.concurrency or 1))
        made.points.append(measured)
    made.complete = True
    return made
