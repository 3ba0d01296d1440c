"""Timing, verification and reporting shared by the kernel benchmarks."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor


class WrongResult(Exception):  # noqa: N818  # it is the answer that is wrong, not the program
    """A provider's result differs from the spec: it is not timed."""


@dataclass(frozen=True, slots=True)
class Row:
    """One provider on one case.

    `state_bytes` is the state read plus the state written, where that is what bounds the step; `moved_bytes` all
    that must be read and written once.
    """

    bench: str
    provider: str
    case: dict[str, int]
    dtype: dict[str, str]
    p20_us: float
    p50_us: float
    p80_us: float
    state_bytes: int | None = None
    moved_bytes: int | None = None

    @property
    def rate_gbps(self) -> float | None:
        """Memory traffic at the median time, in GB/s."""
        counted = self.moved_bytes or self.state_bytes
        return None if counted is None else counted / self.p50_us / 1e3

    def as_json(self, env: dict[str, Any]) -> str:
        """Return the row with its environment, as one line."""
        return json.dumps({**asdict(self), "rate_gbps": self.rate_gbps, "env": env})


def quantiles(times: Sequence[float]) -> tuple[float, float, float]:
    """Return the 20th, 50th and 80th percentile."""
    ordered = sorted(times)
    p20, p50, p80 = (ordered[int(len(ordered) * quantile)] for quantile in (0.2, 0.5, 0.8))
    return p20, p50, p80


def measure(step: Callable[[], object], budget_s: float = 0.5) -> tuple[float, float, float]:
    """Return the 20th, 50th and 80th percentile of a step's wall time in microseconds."""
    step()
    times: list[float] = []
    deadline = time.perf_counter() + budget_s
    while len(times) < 3 or (time.perf_counter() < deadline and len(times) < 3000):
        start = time.perf_counter_ns()
        step()
        times.append((time.perf_counter_ns() - start) / 1e3)
    return quantiles(times)


def largest_error(result: Tensor, expected: Tensor) -> float:
    """Return max |result - expected| / max |expected|."""
    return float((result.double() - expected).abs().max() / expected.abs().max())


def norm_error(result: Tensor, expected: Tensor) -> float:
    """Return |result - expected| / |expected|."""
    return float((result.double() - expected).norm() / expected.norm())


def require(name: str, error: float, tolerance: float) -> None:
    """Refuse a wrong kernel.

    Raises:
        WrongResult: the error exceeds the tolerance, or is not a number.
    """
    if not error <= tolerance:
        raise WrongResult(f"{name}: relative error {error:.1e} against the spec, at most {tolerance:.0e} allowed")


def environment() -> dict[str, Any]:
    """Return what a number means nothing without: machine, versions, threads, commit."""
    return {"cpu": _cpu_name(), "threads": torch.get_num_threads(), **machine("torch", "numba", "kimi-vllm")}


def machine(*packages: str) -> dict[str, Any]:
    """Return the versions of Python and of these packages, the commit and the time."""
    return {
        "python": platform.python_version(),
        **{package: _version(package) for package in packages},
        **_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def words(case: dict[str, int]) -> str:
    """Return a case as a table's cell."""
    return " ".join(f"{name}{value}" for name, value in case.items())


def show(title: str, left: Sequence[str], right: Sequence[str], lines: Iterable[Sequence[str]], width: int) -> None:
    """Print a table whose first columns are words and whose other columns are numbers."""
    table = Table(title=title)
    for column in left:
        table.add_column(column, no_wrap=True)
    for column in right:
        table.add_column(column, justify="right", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    console = Console()
    console.width = max(console.width, width)
    console.print(table)


def report(rows: Sequence[Row], env: dict[str, Any], peer: str) -> None:
    """Print a table with each row's ratio to `peer` on the same case."""
    slowest = {(row.bench, str(row.case)): row.p50_us for row in rows if row.provider == peer}
    lines = []
    for row in rows:
        base = slowest.get((row.bench, str(row.case)))
        spread = f"{row.p20_us:,.1f}-{row.p80_us:,.1f}"
        rate = "" if row.rate_gbps is None else f"{row.rate_gbps:.1f}"
        ratio = "" if base is None else f"{base / row.p50_us:.1f}x"
        lines.append((row.bench, words(row.case), row.provider, f"{row.p50_us:,.1f}", spread, rate, ratio))
    title = f"{env['cpu']}, {env['threads']} threads, torch {env['torch']}, commit {env['commit']}"
    columns = ("median us", "p20-p80 us", "GB/s", f"{peer} / this")
    show(title, ("bench", "case", "provider"), columns, lines, width=120)


def append(row: Row, env: dict[str, Any], path: Path) -> None:
    """Append the row to a file as a JSON line."""
    with path.open("a") as file:
        file.write(row.as_json(env) + "\n")


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> dict[str, Any]:
    def git(*arguments: str) -> str | None:
        folder = Path(__file__).resolve().parent
        result = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
        return result.stdout.strip() if result.returncode == 0 else None

    return {
        "commit": git("rev-parse", "--short", "HEAD") or "none",
        "dirty": git("status", "--porcelain") != "",
    }
