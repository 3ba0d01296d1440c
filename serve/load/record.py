"""A load test as data: `run.json`, written anew after every point, so that what was measured is never lost."""

import json
import os
import platform
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from serve.common.machine import nvidia_smi, processor
from serve.common.paths import ROOT
from serve.load.generator import Target
from serve.load.scenario import Point, Scenario
from serve.load.scrape import Sample

FORMAT = 1
PREFIX = f"{ROOT}/"
PACKAGES = ("vllm", "kimi-vllm", "torch", "transformers", "guidellm")


class RecordError(Exception):
    """A file that is no record of a load test."""


@dataclass(slots=True)
class Measured:
    """A point and what came of it."""

    label: str  # part, and what is swept
    part: str
    kind: str  # of the workload
    prompt: int  # tokens of a random prompt; 0 for others
    concurrency: int | None  # users at once, if that was set
    rate: float | None  # arrivals per second, if that was set
    command: list[str]
    started: float  # seconds since the start of the load test
    ended: float
    result: dict[str, Any] = field(default_factory=dict)  # numbers of the generator; empty if it failed
    file: str = ""  # its own result, beside the record
    error: str = ""  # why there is no result

    def get(self, name: str) -> float | None:
        """A number of the result, None where there is none."""
        value = self.result.get(name)
        return float(value) if isinstance(value, int | float) else None


@dataclass(slots=True)
class Record:
    """A load test."""

    title: str
    about: str
    scenario: dict[str, Any]  # the file's content
    started: str  # date and time, UTC
    environment: dict[str, str]
    model: str
    server_command: list[str]  # empty if it ran already
    goodput: list[str]
    complete: bool = False  # whether all points were tried
    points: list[Measured] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    verdict: list[dict[str, Any]] = field(default_factory=list)  # of a soak; empty for other load tests
    format: int = FORMAT

    def limit(self, part: str) -> float:
        """The most requests per second that a part reached.

        Raises:
            RecordError: none of its points was measured.
        """
        reached = [rate for point in self.points if point.part == part and (rate := point.get("request_throughput"))]
        if not reached:
            raise RecordError(f"no point of {part!r} was measured, so there is no rate to take a share of")
        return max(reached)


def from_root(command: list[str]) -> list[str]:
    """A command as it is typed in the repository's folder with its environment active: without our machine's paths."""
    return [word.removeprefix(PREFIX).removeprefix(".venv/bin/") for word in command]


def without_root(numbers: dict[str, Any]) -> dict[str, Any]:
    """A generator's result, whose texts name the model by its path, in the same way."""
    return {name: value.removeprefix(PREFIX) if isinstance(value, str) else value for name, value in numbers.items()}


def new(scenario: Scenario, target: Target, server_command: list[str]) -> Record:
    """An empty record of a test that starts now."""
    started = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    what = scenario.title, scenario.about, scenario.model_dump(exclude_defaults=True)
    return Record(*what, started, _environment(), target.model, from_root(server_command), [*target.goodput])


def measured(point: Point, command: list[str], started: float, ended: float) -> Measured:
    """A point without a result."""
    what = point.label, point.part.name, point.part.workload.kind
    load = point.prompt, point.concurrency, point.rate
    return Measured(*what, *load, from_root(command), started, ended)


def save(record: Record, path: Path) -> None:
    """Write it in one step: a reader finds the old file or the new one, never a part."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(record), indent=1))
    temporary.replace(path)


def load(path: Path) -> Record:
    """Read one.

    Raises:
        RecordError: it is not one, or of another format.
    """
    try:
        values = json.loads(path.read_text())
        if values["format"] != FORMAT:
            raise RecordError(f"{path} has format {values['format']}, this version reads {FORMAT}")
        points = [Measured(**point) for point in values.pop("points")]
        return Record(**values, points=points)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecordError(f"{path} is not the run.json of a load test: {error}") from error


def _environment() -> dict[str, str]:
    from kimi_vllm.kernels.bench.common import machine

    versions = machine(*PACKAGES)
    found = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": f"{os.cpu_count()} cores, {processor()}",
    }
    found |= {name: versions[name] for name in ("python", *PACKAGES) if versions[name] != "not installed"}
    found["commit"] = f"{versions['commit']}{'-dirty' if versions['dirty'] else ''}"
    return found | ({"GPU": gpu} if (gpu := nvidia_smi("name")) else {})
