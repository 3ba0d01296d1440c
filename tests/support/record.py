"""Which vLLM, device and feature a test run has covered: written by tests, read by the tables of docs/compatibility.md.

A test says what it covers with pytest's `record_property`: ``record_property("covers", "bfloat16")``, or ``"refuses"``
where it shows that a combination is refused by name. With ``--record FILE`` the outcome is merged into that file. Run
whole files so: what is deselected counts for nothing.
"""

import json
import os
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

import pytest

FEATURES = (
    "float32",
    "bfloat16",
    "float16",
    "W8A8 int8",
    "FP8",
    "4 bits",
    "FP8 latents",
    "n-gram drafts",
    "sessions",
    "TP 2",
    "EP 2",
    "PP 2",
    "DP 2",
)
"""What a test may cover, in the order of the table's columns."""


def outcomes(reports: Iterable[pytest.TestReport]) -> dict[str, str]:
    """By feature, "tested" if all tests that cover it passed, "refused" if all say so, else "failed".

    A test that breaks before it can say what it covers makes all features of its file "failed".
    """
    reports = list(reports)
    broken = {_file(report) for report in reports if report.outcome == "failed" and not report.user_properties}
    found: dict[str, set[str]] = {}
    for report in reports:
        if report.when != "call" and report.outcome != "failed":
            continue
        for kind, feature in report.user_properties:
            if kind not in ("covers", "refuses"):
                continue
            if feature not in FEATURES:
                raise ValueError(f"{report.nodeid} covers {feature!r}, which is not one of {', '.join(FEATURES)}")
            if report.outcome != "skipped":
                passed = "tested" if kind == "covers" else "refused"
                good = report.outcome == "passed" and _file(report) not in broken
                found.setdefault(str(feature), set()).add(passed if good else "failed")
    return {feature: kinds.pop() if len(kinds) == 1 else "failed" for feature, kinds in found.items()}


def _file(report: pytest.TestReport) -> str:
    return report.nodeid.partition("::")[0]


def merge(path: Path, vllm: str, device: str, found: dict[str, str]) -> None:
    """Put the outcomes of a run beside those of other runs."""
    today = datetime.now(UTC).date().isoformat()
    known = json.loads(path.read_text()) if path.exists() else {}
    row = known.setdefault(vllm, {}).setdefault(device, {})
    row |= {feature: f"{outcome} {today}" for feature, outcome in found.items()}
    path.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")


def machine() -> tuple[str, str]:
    """The version of vLLM without its build, and the GPU by name or "CPU"."""
    import torch

    from kimi_vllm._vllm import installed_vllm

    _, release = installed_vllm() or ("", "none")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "x86-64 CPU"
    return release.partition("+")[0], device


class Recorder:
    """A pytest plugin that collects reports and merges their outcomes when the session ends."""

    def __init__(self, path: Path) -> None:
        self._path, self._reports = path, list[pytest.TestReport]()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep a report; with xdist it comes from a worker."""
        self._reports.append(report)

    def pytest_sessionfinish(self) -> None:
        """Write, in the process that has all reports."""
        if "PYTEST_XDIST_WORKER" not in os.environ and (found := outcomes(self._reports)):
            merge(self._path, *machine(), found)
