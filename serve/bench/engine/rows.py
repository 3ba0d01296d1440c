"""Rows of results: JSON lines, written one by one as soon as they exist, so that a run that is killed leaves them."""

import json
import os
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kimi_vllm._vllm import installed_vllm
from kimi_vllm.kernels.bench.common import machine
from serve.bench.engine.profile_steps import categorise_again

Row = dict[str, Any]


class Rows:
    """Appends rows of one provider to a file."""

    def __init__(self, path: Path, provider: str) -> None:
        self.path, self.provider = path, provider

    def write(self, bench: str, case: dict[str, Any], fields: Row) -> Row:
        """Append one row; return it."""
        date = datetime.now(UTC).isoformat(timespec="seconds")
        row = {"bench": bench, "provider": self.provider, "case": case, **fields, "date": date}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            # A run that was killed may have left half a line, which must not spoil this one.
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(json.dumps(row).encode() + b"\n")
        return row


def read(path: Path) -> list[Row]:
    """All rows of a file; lines that were cut off are left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "profile" in row:
            row["profile"] = categorise_again(row["profile"])
        rows.append(row)
    return rows


def latest(rows: Iterable[Row], bench: str) -> dict[tuple[str, str], Row]:
    """By provider and case, the last good row of a measurement, in the order of the file."""
    found = {}
    for row in rows:
        if row["bench"] == bench and "error" not in row and "skipped" not in row:
            found[row["provider"], json.dumps(row["case"])] = row
    return found


def environment() -> Row:
    """What a number means nothing without: device, driver, versions, commit."""
    import torch

    device: Row = {"device": _cpu_name(), "cores": os.cpu_count()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        device = {
            "device": properties.name,
            "device_bytes": properties.total_memory,
            "driver": _driver(),
            "cuda": torch.version.cuda,
        }
    settings = {name: value for name, value in os.environ.items() if name.startswith(("VLLM_", "KIMI_"))}
    hidden = ("KEY", "TOKEN", "PATH", "ROOT", "DIR", "FOLDER")
    private = {name for name in settings if any(word in name for word in hidden)}
    return {
        **device,
        **machine("torch", "triton", "kimi-vllm"),
        "vllm": " ".join(installed_vllm() or ("not installed",)),
        "settings": {name: settings[name] for name in sorted(settings.keys() - private)},
    }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.split("\n")[0].strip()


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown"
