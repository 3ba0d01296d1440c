"""Pictures of the rows: step time against context, its parts, requests at once, latency under mixed load."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from serve.bench.engine.plan import IN_TREE, OURS
from serve.bench.engine.rows import Row, latest
from serve.bench.engine.tables import providers, tokens

COLOURS = {OURS: "C0", IN_TREE: "C1", "floor": "0.5"}
Line = list[tuple[float, float]]


def plot(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw all pictures for which there are rows; return the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    device = next((row["env"]["device"] for row in reversed(rows) if row["bench"] == "header"), "unknown device")
    written: list[Path] = []
    single = [row for row in latest(rows, "tpot").values() if row["case"]["batch"] == "1"]
    # Where only one request fits, batch 1 is the largest batch.
    largest = {(row["provider"], row["case"]["context"]): row for row in single}
    largest |= {
        (row["provider"], row["case"]["context"]): row
        for row in latest(rows, "tpot").values()
        if row["case"]["batch"] == "largest"
    }
    if single:
        lines = _lines(single, lambda row: row["tpot"]["p50_ms"])
        if floor := sorted({(row["case"]["context"], row["floor_ms"]) for row in single if row["floor_ms"]}):
            lines["floor"] = floor
        written.append(_draw(folder / "tpot.png", f"Decode, batch 1, {device}", "ms per token", lines))
    if largest:
        lines = _lines(list(largest.values()), lambda row: row["tpot"]["p50_ms"] / row["requests"])
        title = f"Decode, the largest batch that fits, {device}"
        written.append(_draw(folder / "tpot-amortised.png", title, "ms per token (step time / batch)", lines, log=True))
    profiled = [row for row in single if "gpu_ms" in row.get("profile", {})]
    if profiled:
        lines = {}
        for part in ("KDA", "MLA"):
            for name, line in _lines(profiled, lambda row, part=part: row["profile"]["gpu_ms"][part]).items():
                lines[f"{name}, {part}"] = line
        title = f"GPU time of a decode step, batch 1, {device}"
        written.append(_draw(folder / "kda-mla.png", title, "ms per step", lines))
    if some := list(latest(rows, "concurrency").values()):
        groups = {tokens(prompt): prompt for prompt in sorted({row["case"]["prompt"] for row in some})}
        bars = {
            name: [
                next((r["running"] for r in some if (r["provider"], r["case"]["prompt"]) == (name, prompt)), 0)
                for prompt in groups.values()
            ]
            for name in providers(some)
        }
        title = f"Requests that run at once, {device}"
        written.append(_bars(folder / "concurrency.png", title, "requests", list(groups), bars, "tokens of the prompt"))
    if some := list(latest(rows, "mixed").values()):
        bars = {row["provider"]: [row["itl"]["p50_ms"], row["itl"]["p99_ms"]] for row in some}
        case = some[-1]["case"]
        title = f"{case['decoders']} requests decode while {tokens(case['prompt'])}-token prompts arrive, {device}"
        written.append(_bars(folder / "mixed-load.png", title, "ms between tokens", ["p50", "p99"], bars, ""))
    return written


def _lines(rows: Sequence[Row], y: Callable[[Row], float]) -> dict[str, Line]:
    return {
        name: sorted((row["case"]["context"], y(row)) for row in rows if row["provider"] == name)
        for name in providers(rows)
    }


def _axes(title: str, y: str) -> tuple[Any, Any]:
    figure, axes = plt.subplots(figsize=(6.4, 4), dpi=120)
    axes.set_title(title, fontsize=9)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, axes: Any, path: Path) -> Path:
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
    return path


def _draw(path: Path, title: str, y: str, lines: dict[str, Line], *, log: bool = False) -> Path:
    figure, axes = _axes(title, y)
    for index, (name, points) in enumerate(lines.items()):
        provider, _, part = name.partition(", ")
        style = "--" if name == "floor" or part == "MLA" else "-"
        marker = "" if name == "floor" else "s" if provider == IN_TREE else "o"
        axes.plot(
            *zip(*points, strict=True),
            color=COLOURS.get(provider, f"C{index + 2}"),
            ls=style,
            marker=marker,
            label=name,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({x for points in lines.values() for x, _ in points}))
    axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: tokens(round(value))))
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.set_xlabel("tokens of context")
    if log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.grid(visible=True, which="major", alpha=0.3)
    return _save(figure, axes, path)


def _bars(path: Path, title: str, y: str, groups: list[str], bars: dict[str, list[float]], x: str) -> Path:
    figure, axes = _axes(title, y)
    width = 0.8 / len(bars)
    for index, (name, heights) in enumerate(bars.items()):
        places = [group + (index - (len(bars) - 1) / 2) * width for group in range(len(groups))]
        drawn = axes.bar(places, heights, width * 0.95, color=COLOURS.get(name, f"C{index + 2}"), label=name)
        axes.bar_label(drawn, fmt="{:.4g}", fontsize=8)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_xlabel(x)
    axes.grid(visible=True, axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    return _save(figure, axes, path)
