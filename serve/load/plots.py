"""The pictures of a load test, as SVG: percentiles, throughput against latency, a timeline, context length, caches."""

import base64
import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from load.generator import PERCENTILES
from load.record import Measured, Record
from matplotlib.ticker import NullLocator, ScalarFormatter

LATENCIES = {"ttft": "time to first token", "tpot": "time per output token", "itl": "time between tokens"}
Detail = dict[str, list[Any]]


def pictures(record: Record, details: dict[str, Detail]) -> dict[str, str]:
    """All pictures for which there are numbers, as data URIs by title.

    Args:
        record: the load test.
        details: by label of a mixed point, the lists that `vllm bench serve --save-detailed` wrote; times in seconds.
    """
    found: dict[str, str] = {}
    points = [point for point in record.points if point.result]
    for part in dict.fromkeys(point.part for point in points):
        mine = [point for point in points if point.part == part]
        prompts = sorted({point.prompt for point in mine if point.prompt})
        first = [point for point in mine if point.prompt == prompts[0]] if prompts else []
        for name, axis in (("concurrency", "requests at once"), ("rate", "requests per second")):
            swept = sorted(
                (point for point in first if getattr(point, name)), key=lambda point: float(getattr(point, name))
            )
            if len({getattr(point, name) for point in swept}) > 1:
                found[f"{part}: latency against {axis}"] = _percentiles(
                    swept, axis, lambda point, name=name: float(getattr(point, name))
                )
        if len(prompts) > 1:
            same = [point for point in mine if (point.concurrency, point.rate) == (mine[0].concurrency, mine[0].rate)]
            title = f"{part}: latency against context length"
            found[title] = _percentiles(same, "tokens of prompt", lambda point: float(point.prompt))
    if len([point for point in points if point.get("p50_tpot_ms")]) > 1:
        found["Throughput against latency"] = _pareto(points)
    for label, detail in details.items():
        if any(detail.get("itls", [])):
            found[f"{label}: time between tokens while prompts arrive"] = _timeline(detail)
    if len(record.samples) > 2:
        found["Caches and requests over time"] = _over_time(record)
    return found


def _svg(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.tight_layout()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _tidy(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(x, fontsize=8)
    axes.set_ylabel(y, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, alpha=0.3)


def _percentiles(points: Sequence[Measured], axis: str, x: Callable[[Measured], float]) -> str:
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.2))
    for axes, (name, title) in zip(panels, LATENCIES.items(), strict=True):
        for percentile, style in zip(PERCENTILES, ("-o", "--s", ":^"), strict=True):
            line = [
                (x(point), value)
                for point in points
                if (value := point.get(f"p{percentile}_{name}_ms")) is not None and value > 0
            ]
            if line:
                axes.plot(*zip(*line, strict=True), style, color="C0", markersize=4, label=f"p{percentile}")
        _tidy(axes, title, axis, "ms")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({x(point) for point in points}))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_ylim(bottom=0)
        if axes.lines:
            axes.legend(frameon=False, fontsize=8)
    return _svg(figure)


def _pareto(points: Sequence[Measured]) -> str:
    figure, axes = plt.subplots(figsize=(7, 4))
    for index, part in enumerate(dict.fromkeys(point.part for point in points)):
        places = []
        for point in points:
            tpot, throughput = point.get("p50_tpot_ms"), point.get("output_throughput")
            if point.part == part and tpot and throughput:
                places.append((1000 / tpot, throughput))
                what = point.concurrency or (f"{point.rate:g}/s" if point.rate else "")
                axes.annotate(str(what), places[-1], fontsize=7, xytext=(4, 4), textcoords="offset points")
        if places:
            axes.plot(*zip(*sorted(places), strict=True), "-o", color=f"C{index}", markersize=4, label=part)
    _tidy(
        axes, "up and to the right is better", "output tokens/s of one user (1 / median TPOT)", "output tokens/s of all"
    )
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    return _svg(figure)


def _timeline(detail: Detail) -> str:
    figure, axes = plt.subplots(figsize=(11, 3.2))
    start = min(detail["start_times"])
    # Long prompts are those above half the longest; while they are read, decoding requests may have to wait.
    long = max(detail["input_lens"]) / 2
    for began, ttft, tokens, itls in zip(
        detail["start_times"], detail["ttfts"], detail["input_lens"], detail["itls"], strict=True
    ):
        if tokens > long:
            axes.axvspan(began - start, began - start + ttft, color="C1", alpha=0.2, lw=0)
            continue
        now, times = began - start + ttft, []
        for gap in itls:
            now += gap
            times.append(now)
        axes.plot(times, [gap * 1000 for gap in itls], ".", color="C0", markersize=2)
    axes.plot([], [], ".", color="C0", label="a token of a decoding request")
    axes.fill_between([], [], color="C1", alpha=0.2, label="a long prompt, until its first token")
    _tidy(axes, "", "seconds", "ms since the token before")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8, loc="upper right")
    return _svg(figure)


def hit_rate(
    samples: Sequence[dict[str, float]], hits: str, queries: str, window: int = 20
) -> list[tuple[float, float]]:
    """Share of hits among the queries of the last `window` samples, where there were any, with its time in seconds."""
    found = []
    for index, sample in enumerate(samples):
        before = samples[max(0, index - window)]
        asked = sample.get(queries, 0.0) - before.get(queries, 0.0)
        if asked > 0:
            found.append((sample["t"], (sample.get(hits, 0.0) - before.get(hits, 0.0)) / asked))
    return found


def _over_time(record: Record) -> str:
    figure, panels = plt.subplots(3, 1, figsize=(11, 7), sharex=True)
    samples = record.samples
    times = [sample["t"] for sample in samples]
    states = [
        {**sample, "asked": sample.get("state_hit_tokens", 0.0) + sample.get("state_miss_tokens", 0.0)}
        for sample in samples
    ]
    rates = {
        "prefix cache (pages and states)": hit_rate(samples, "prefix_hits", "prefix_queries"),
        "state cache": hit_rate(states, "state_hit_tokens", "asked"),
    }
    for index, (name, line) in enumerate(rates.items()):
        if line:
            panels[0].plot(*zip(*line, strict=True), ("-", "--")[index], label=name)
    _tidy(panels[0], "prompt tokens found in the cache, last 10 s", "", "share")
    panels[0].set_ylim(0, 1)
    kinds = [kind for kind in ("live", "checkpoint", "free") if any(f"slots_{kind}" in sample for sample in samples)]
    if kinds:
        heights = [[sample.get(f"slots_{kind}", 0.0) for sample in samples] for kind in kinds]
        panels[1].stackplot(times, *heights, labels=kinds, alpha=0.7)
    _tidy(panels[1], "state slots", "", "slots")
    for name in ("running", "waiting"):
        panels[2].plot(times, [sample.get(name, 0.0) for sample in samples], label=name)
    _tidy(panels[2], "requests in the server", "seconds", "requests")
    for axes in panels:
        for point in record.points:
            axes.axvline(point.started, color="0.7", lw=0.5)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8, loc="upper right")
    return _svg(figure)
