"""The Grafana dashboard as it is shipped."""

import json
import re
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[2] / "serve" / "dashboard" / "kimi-vllm.json"


def load() -> dict[str, Any]:
    """The dashboard."""
    found: dict[str, Any] = json.loads(FILE.read_text())
    return found


def expressions() -> list[str]:
    """All queries of all panels."""
    return [target["expr"] for panel in load()["panels"] for target in panel.get("targets", [])]


def metrics() -> set[str]:
    """The time series that the queries name."""
    return set(re.findall(r"\b(?:vllm:|kimi_state_)\w+", " ".join(expressions())))


def of_drafts(name: str) -> bool:
    """Whether a time series, or a query that names it, is there only with ``--speculative-config``."""
    return "vllm:spec_decode_" in name
