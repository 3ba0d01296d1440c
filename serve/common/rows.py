"""Results as JSON: rows, a line each, written as soon as they exist, so that a run that is killed leaves them."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from serve.common.machine import facts

Row = dict[str, Any]


T = TypeVar("T")


def append(path: Path, row: Row) -> None:
    """Append a row, making the file's folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        # A run that was killed may have left half a line, which must not spoil this one.
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(row).encode() + b"\n")


def read(path: Path) -> list[Row]:
    """All rows of a file; lines that were cut off are left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def take(bench: str, found: Iterable[T], environment: Row, path: Path | None) -> list[T]:
    """Collect the dataclasses that a benchmark finds; append each with the environment to the file, if one is given."""
    taken = []
    for one in found:
        taken.append(one)
        if path is not None:
            append(path, {"bench": bench, **asdict(one), "env": environment})
    return taken


def save(path: Path, result: Row, *packages: str) -> None:
    """Write one result with the machine, versions of these packages, and the date."""
    environment = facts(*packages)
    stamp = {"env": environment, "date": environment.pop("date")[:10]}
    path.write_text(json.dumps(result | stamp, indent=1) + "\n")
