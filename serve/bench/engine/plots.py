"""Pictures of the rows: step time against context, its parts, requests at once, drafts, latency under mixed load."""

from collections.abc import Callable, Sequence
from pathlib import Path

from serve.bench.engine.plan import IN_TREE, OURS
from serve.bench.engine.rows import Row, draft_rates, latest
from serve.bench.engine.tables import providers
from serve.common.plots import log_ticks, panels, save, tidy
from serve.common.tables import tokens

COLOURS = {OURS: "C0", IN_TREE: "C1", "floor": "0.5"}
Line = list[tuple[float, float]]


def plot(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw all pictures for which there are rows; return the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    device = next((row["env"]["device"] for row in reversed(rows) if row["bench"] == "header"), "unknown device")
    steps = list(latest(rows, "tpot").values())
    single = [row for row in steps if row["case"]["batch"] == "1"]
    written = []
    if single:
        lines = _lines(single, lambda row: row["tpot"]["p50_ms"])
        if floor := sorted({(row["case"]["context"], row["floor_ms"]) for row in single if row["floor_ms"]}):
            lines["floor"] = floor
        written.append(_draw(folder / "tpot.png", f"Decode, batch 1, {device}", "ms per token", lines))
    # Where only one request fits, batch 1 is the largest batch.
    largest = {(row["provider"], row["case"]["context"]): row for row in single}
    largest |= {(row["provider"], row["case"]["context"]): row for row in steps if row["case"]["batch"] == "largest"}
    if largest:
        lines = _lines(list(largest.values()), lambda row: row["tpot"]["p50_ms"] / row["requests"])
        title = f"Decode, the largest batch that fits, {device}"
        written.append(_draw(folder / "tpot-amortised.png", title, "ms per token (step time / batch)", lines, log=True))
    if profiled := [row for row in single if "gpu_ms" in row.get("profile", {})]:
        lines = {
            f"{name}, {part}": line
            for part in ("KDA", "MLA")
            for name, line in _lines(profiled, lambda row, part=part: row["profile"]["gpu_ms"][part]).items()
        }
        title = f"GPU time of a decode step, batch 1, {device}"
        written.append(_draw(folder / "kda-mla.png", title, "ms per step", lines))
    if some := list(latest(rows, "concurrency").values()):
        prompts = sorted({row["case"]["prompt"] for row in some})
        found = {(row["provider"], row["case"]["prompt"]): row["running"] for row in some}
        bars = {name: [found.get((name, prompt), 0) for prompt in prompts] for name in providers(some)}
        title, groups = f"Requests that run at once, {device}", [tokens(prompt) for prompt in prompts]
        written.append(_bars(folder / "concurrency.png", title, "requests", groups, bars, "tokens of the prompt"))
    rates = draft_rates(rows)
    if right := sorted({share for *_, share in rates if share is not None}):
        at_once = max(requests for _, requests, share in rates if share is not None)
        bars = {
            name: [rates[name, at_once, share] for share in (None, *right)]
            for name in dict.fromkeys(name for name, *_ in rates)
            if all((name, at_once, share) in rates for share in (None, *right))
        }
        title, groups = f"{at_once} requests, n-gram drafts, {device}", ["none", *(f"{share:.0%}" for share in right)]
        written.append(_bars(folder / "drafts.png", title, "tokens/s", groups, bars, "drafts that are right"))
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


def _draw(path: Path, title: str, y: str, lines: dict[str, Line], *, log: bool = False) -> Path:
    figure, [[axes]] = panels(figsize=(6.4, 4))
    for index, (name, points) in enumerate(lines.items()):
        provider, _, part = name.partition(", ")
        style = "--" if name == "floor" or part == "MLA" else "-"
        marker = "" if name == "floor" else "s" if provider == IN_TREE else "o"
        colour = COLOURS.get(provider, f"C{index + 2}")
        axes.plot(*zip(*points, strict=True), color=colour, ls=style, marker=marker, label=name)
    tidy(axes, title, "tokens of context", y)
    log_ticks(axes, sorted({x for points in lines.values() for x, _ in points}), lambda x: tokens(round(x)))
    if log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return save(figure, path)


def _bars(path: Path, title: str, y: str, groups: list[str], bars: dict[str, list[float]], x: str) -> Path:
    figure, [[axes]] = panels(figsize=(6.4, 4))
    width = 0.8 / len(bars)
    for index, (name, heights) in enumerate(bars.items()):
        places = [group + (index - (len(bars) - 1) / 2) * width for group in range(len(groups))]
        drawn = axes.bar(places, heights, width * 0.95, color=COLOURS.get(name, f"C{index + 2}"), label=name)
        axes.bar_label(drawn, fmt=lambda height: f"{height:,.0f}" if height >= 100 else f"{height:.4g}", fontsize=8)
    axes.set_xticks(range(len(groups)), groups)
    tidy(axes, title, x, y)
    axes.legend(frameon=False)
    return save(figure, path)
