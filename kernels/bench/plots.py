"""Plots of the CUDA benchmark's rows: time and share of the copy rate against batch, time against length."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STYLE = {"kimi-vllm": ("C0", "o"), "in-tree": ("C1", "s"), "fla": ("C2", "^"), "floor": ("0.5", "")}


def plot(rows: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Draw what the JSON lines of one run hold; return the files written."""
    env = rows[0]["env"]
    H = max(row["case"]["H"] for row in rows)
    decode = [row for row in rows if row["bench"] == "decode" and row["case"]["H"] == H]
    prefill = [row for row in rows if row["bench"] == "prefill" and row["case"]["H"] == H and row["case"]["N"] == 1]
    floor = _floor(env["copy_gbps"])
    written = []
    for state in sorted({row["dtype"]["state"] for row in decode}):
        some = [row for row in decode if row["dtype"]["state"] == state]
        lines = {**_lines(some, "N", _median), "floor": _lines(some, "N", floor).popitem()[1]}
        title = f"KDA decode, one layer, {H} heads, {state} state, {env['gpu']}"
        written.append(_draw(folder / f"decode-{state}.png", title, "batch", "µs", lines, log=True))
        share = _lines(some, "N", lambda row: 100 * floor(row) / row["p50_us"])
        written.append(_draw(folder / f"decode-{state}-roofline.png", title, "batch", "% of the copy rate", share))
    if prefill:
        lines = {
            **_lines(prefill, "T", lambda row: row["p50_us"] / 1e3),
            "floor": _lines(prefill, "T", lambda row: floor(row) / 1e3).popitem()[1],
        }
        title = f"KDA prefill, one layer, one sequence, {H} heads, {env['gpu']}"
        written.append(_draw(folder / "prefill.png", title, "tokens", "ms", lines, log=True))
    return written


def _median(row: dict[str, Any]) -> float:
    return float(row["p50_us"])


def _floor(copy_gbps: float) -> Callable[[dict[str, Any]], float]:
    return lambda row: row["moved_bytes"] / copy_gbps / 1e3


def _lines(
    rows: list[dict[str, Any]], x: str, y: Callable[[dict[str, Any]], float]
) -> dict[str, list[tuple[int, float]]]:
    lines = defaultdict(list)
    for row in rows:
        lines[row["provider"]].append((row["case"][x], y(row)))
    return {name: sorted(points) for name, points in lines.items()}


def _draw(
    path: Path, title: str, x: str, y: str, lines: dict[str, list[tuple[int, float]]], *, log: bool = False
) -> Path:
    figure, axes = plt.subplots(figsize=(6.4, 4), dpi=120)
    for name, points in lines.items():
        colour, marker = STYLE[name]
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker, ls="-" if marker else "--", label=name)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    if log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, 105)
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.title.set_fontsize(9)
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
    return path
