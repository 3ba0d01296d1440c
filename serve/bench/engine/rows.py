"""The benchmark's rows: who was measured, at which case, and what came of it."""

import json
import os
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from serve.bench.engine.profile_steps import categorise_again
from serve.common import rows as lines
from serve.common.machine import facts
from serve.common.rows import Row

_PRIVATE = ("KEY", "TOKEN", "PATH", "ROOT", "DIR", "FOLDER")


class Rows:
    """Appends rows of one provider to a file."""

    def __init__(self, path: Path, provider: str) -> None:
        self.path, self.provider = path, provider

    def write(self, bench: str, case: dict[str, Any], fields: Row) -> None:
        """Append one row."""
        date = datetime.now(UTC).isoformat(timespec="seconds")
        lines.append(self.path, {"bench": bench, "provider": self.provider, "case": case, **fields, "date": date})


def read(path: Path) -> list[Row]:
    """All rows of a file, their profiles by today's categories."""
    rows = lines.read(path)
    return [row | ({"profile": categorise_again(row["profile"])} if "profile" in row else {}) for row in rows]


def latest(rows: Iterable[Row], bench: str) -> dict[tuple[str, str], Row]:
    """By provider and case, the last good row of a measurement, in the order of the file."""
    found = {}
    for row in rows:
        if row["bench"] == bench and "error" not in row and "skipped" not in row:
            found[row["provider"], json.dumps(row["case"])] = row
    return found


def draft_rates(rows: Iterable[Row]) -> dict[tuple[str, int, float | None], float]:
    """Tokens per second with drafts, by provider, requests at once and the share of drafts that is right.

    Without drafts that share is None. By the median step: of forty, one that waits for something else weighs too much.
    """
    return {
        (row["provider"], row["case"]["requests"], row["case"]["right"]): row["case"]["requests"]
        * row["tokens_per_step"]
        / row["step"]["p50_ms"]
        * 1e3
        for row in latest(rows, "drafts").values()
    }


def environment() -> Row:
    """Machine and versions, and the variables that vLLM and the plugin read, without paths and secrets."""
    settings = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(("VLLM_", "KIMI_")) and not any(word in name for word in _PRIVATE)
    }
    return {**facts("torch", "triton", "kimi-vllm"), "settings": settings}
