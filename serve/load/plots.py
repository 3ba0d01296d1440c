"""The pictures of one load test or of two, as SVG: percentiles, throughput against latency, a timeline, caches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import attrgetter
from typing import Any

from serve.common.plots import data_uri, log_ticks, panels, tidy
from serve.load.generator import PERCENTILES
from serve.load.record import Measured, Record

LATENCIES = {"ttft": "TTFT: time to first token", "tpot": "TPOT: time per output token", "itl": "ITL: between tokens"}
STYLES = {50: "-o", 90: "--s", 99: ":^"}
BLOCKS = {"state": "C0", "page": "C2", "kept": "C1", "loose": "0.7", "clean": "0.9"}
MARKERS = "osD^vP*X"  # for those who see no difference between the colours
WIDTH = 11  # inches
HIT_WINDOW = 20  # samples
Detail = dict[str, list[Any]]


@dataclass(frozen=True, slots=True)
class Sweep:
    """Points that differ in one number."""

    axis: str  # what they differ in, for the x-axis
    name: str  # of the field that has the number
    points: list[Measured]

    def x(self, point: Measured) -> float:
        """The number of a point."""
        return float(getattr(point, self.name))


def pictures(record: Record, details: dict[str, Detail]) -> dict[str, str]:
    """All pictures for which there are numbers, as data URIs by title.

    Args:
        details: by label of a mixed point, the lists that `vllm bench serve --save-detailed` wrote; times in seconds.
    """
    found = {title: _percentiles({"": sweep}) for title, sweep in sweeps(record).items()}
    points = _with_throughput(record)
    if len(points) > 1:
        found["Throughput against latency"] = _pareto({"": points})
    for label, detail in details.items():
        if any(detail.get("itls", [])):
            found[f"{label}: time between tokens while prompts arrive"] = _timeline(detail)
    if len(record.samples) > 2:
        found["Caches and requests over time"] = _over_time(record)
    return found


def comparison(first: Record, second: Record) -> dict[str, str]:
    """The pictures that two load tests have in common, with both in each, as data URIs by title."""
    others = sweeps(second)
    found = {
        title: _percentiles({"A": sweep, "B": others[title]})
        for title, sweep in sweeps(first).items()
        if title in others
    }
    both = {"A": _with_throughput(first), "B": _with_throughput(second)}
    if all(both.values()):
        found["Throughput against latency"] = _pareto(both)
    return found


def sweeps(record: Record) -> dict[str, Sweep]:
    """Each part that sweeps a number, by a title for its picture."""
    found: dict[str, Sweep] = {}
    points = [point for point in record.points if point.result]
    for part in dict.fromkeys(point.part for point in points):
        mine = [point for point in points if point.part == part]
        prompts = sorted({point.prompt for point in mine if point.prompt})
        first = [point for point in mine if point.prompt == prompts[0]] if prompts else []
        for name, axis in (("concurrency", "requests at once"), ("rate", "requests per second")):
            swept = sorted((point for point in first if getattr(point, name)), key=attrgetter(name))
            if len({getattr(point, name) for point in swept}) > 1:
                found[f"{part}: latency against {axis}"] = Sweep(axis, name, swept)
        if len(prompts) > 1:
            same = [point for point in mine if (point.concurrency, point.rate) == (mine[0].concurrency, mine[0].rate)]
            found[f"{part}: latency against context length"] = Sweep("tokens of prompt", "prompt", same)
    return found


def _with_throughput(record: Record) -> list[Measured]:
    return [point for point in record.points if point.get("p50_tpot_ms") and point.get("output_throughput")]


def _percentiles(runs: Mapping[str, Sweep]) -> str:
    """Three panels; with two runs each has its colour, and p90 is left out."""
    figure, [row] = panels(1, 3, figsize=(WIDTH, 3.2))
    axis = next(iter(runs.values())).axis
    shown = PERCENTILES if len(runs) == 1 else (PERCENTILES[0], PERCENTILES[-1])
    for axes, (name, title) in zip(row, LATENCIES.items(), strict=True):
        for index, (run, sweep) in enumerate(runs.items()):
            for percentile in shown:
                values = ((sweep.x(point), point.get(f"p{percentile}_{name}_ms")) for point in sweep.points)
                if line := [(x, value) for x, value in values if value is not None and value > 0]:
                    label, style = f"{run} p{percentile}".strip(), STYLES[percentile]
                    axes.plot(*zip(*line, strict=True), style, color=f"C{index}", markersize=4, label=label)
        tidy(axes, title, axis, "ms").set_ylim(0, axes.get_ylim()[1] * 1.05)
        log_ticks(axes, sorted({sweep.x(point) for sweep in runs.values() for point in sweep.points}))
    lines, labels = row[0].get_legend_handles_labels()
    figure.legend(lines, labels, frameon=False, fontsize=8, ncols=len(labels), loc="upper right")
    return data_uri(figure, rect=(0, 0, 1, 0.94))


def _pareto(runs: Mapping[str, Sequence[Measured]]) -> str:
    """A panel a run, with equal axes; points that no other beats in both directions are on the line of the front."""
    figure, [row] = panels(1, len(runs), figsize=(WIDTH, 4.2), sharex=True, sharey=True)
    parts = list(dict.fromkeys(point.part for points in runs.values() for point in points))
    looks = {part: (MARKERS[index % len(MARKERS)], f"C{index}") for index, part in enumerate(parts)}
    for axes, (run, points) in zip(row, runs.items(), strict=True):
        places = []
        for number, point in enumerate(points):
            place = 1000 / float(point.result["p50_tpot_ms"]), float(point.result["output_throughput"])
            places.append(place)
            marker, colour = looks[point.part]
            axes.plot(*place, marker, color=colour, markersize=5)
            what = point.label.removeprefix(point.part).lstrip(", ").split(", ")[0]
            axes.annotate(what, place, fontsize=7, xytext=(5, (4, -9)[number % 2]), textcoords="offset points")
        axes.plot(*zip(*front(places), strict=True), "-", color="0.6", lw=1, zorder=1)
        tidy(axes, run, "output tokens/s of one user (1 / median TPOT)", "output tokens/s of all")
    axes.set_xlim(0, axes.get_xlim()[1] * 1.1)  # of all panels: room for the words beside the points
    axes.set_ylim(0, axes.get_ylim()[1] * 1.05)
    for part, (marker, colour) in looks.items():
        axes.plot([], [], marker, color=colour, label=part)
    axes.plot([], [], "-", color="0.6", label="best of all")
    _legend(axes)
    return data_uri(figure)


def _legend(axes: Any) -> None:
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def front(places: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The places that no other is right of and above, from left to right."""
    found: list[tuple[float, float]] = []
    for place in sorted(places, reverse=True):
        if not found or place[1] > found[-1][1]:
            found.append(place)
    return found[::-1]


def _timeline(detail: Detail) -> str:
    figure, [[axes]] = panels(figsize=(WIDTH, 3.2))
    start = min(detail["start_times"])
    # Long prompts are those above half the longest; while they are read, decoding requests may have to wait.
    long = max(detail["input_lens"]) / 2
    requests = (detail[name] for name in ("start_times", "ttfts", "input_lens", "itls"))
    for began, ttft, tokens, itls in zip(*requests, strict=True):
        first = began - start + ttft
        if tokens > long:
            axes.axvspan(began - start, first, color="C1", alpha=0.2, lw=0)
        else:
            times = [first + later for later in accumulate(itls)]
            axes.plot(times, [gap * 1000 for gap in itls], ".", color="C0", markersize=2)
    axes.plot([], [], ".", color="C0", markersize=6, label="a token of a decoding request")
    axes.fill_between([], [], color="C1", alpha=0.2, label="a long prompt, until its first token")
    tidy(axes, "", "seconds", "ms since the token before").set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    return data_uri(figure)


def hit_rate(
    samples: Sequence[dict[str, float]], hits: str, queries: Sequence[str], window: int = HIT_WINDOW
) -> list[tuple[float, float]]:
    """Share of hits among the queries of the last `window` samples, where there were any, with its time in seconds."""
    found = []
    for index, sample in enumerate(samples):
        before = samples[max(0, index - window)]
        asked = sum(sample.get(name, 0.0) - before.get(name, 0.0) for name in queries)
        if asked > 0:
            found.append((sample["t"], (sample.get(hits, 0.0) - before.get(hits, 0.0)) / asked))
    return found


def _over_time(record: Record) -> str:
    samples, times = record.samples, [sample["t"] for sample in record.samples]
    memory = [(sample["t"], sample["rss_bytes"] / 2**20) for sample in samples if "rss_bytes" in sample]
    count = 4 if memory else 3
    figure, column = panels(count, 1, figsize=(WIDTH, 2.3 * count), sharex=True)
    caches, blocks, requests, *resident = (axes for [axes] in column)
    for hits, queries, look in (
        ("prefix_hits", ["prefix_queries"], {"label": "prefix cache\n(pages and states)", "lw": 3, "alpha": 0.4}),
        ("state_hit_tokens", ["state_hit_tokens", "state_miss_tokens"], {"label": "state cache", "ls": "--"}),
    ):
        if line := hit_rate(samples, hits, queries):
            caches.plot(*zip(*line, strict=True), **look)
    window = HIT_WINDOW * (times[-1] - times[0]) / (len(times) - 1)
    tidy(caches, f"share of prompt tokens found in the cache, last {window:.0f} s", "", "share").set_ylim(0, 1)
    kinds = [kind for kind in BLOCKS if any(f"blocks_{kind}" in sample for sample in samples)]
    if kinds:
        heights = [[sample.get(f"blocks_{kind}", 0.0) for sample in samples] for kind in kinds]
        blocks.stackplot(times, *heights, labels=kinds, colors=[BLOCKS[kind] for kind in kinds], step="post")
    tidy(blocks, "what blocks hold", "", "blocks")
    for name in ("running", "waiting"):
        requests.plot(times, [sample.get(name, 0.0) for sample in samples], label=name)
    tidy(requests, "requests in the server", "", "requests").set_ylim(bottom=0)
    for axes in resident:
        axes.plot(*zip(*memory, strict=True), label="all processes\nof the server")
        tidy(axes, "resident memory", "", "MiB").set_ylim(bottom=0)
    for [axes] in column:
        axes.set_xlim(0, times[-1])
        for point in record.points:
            axes.axvline(point.started, color="0.5", lw=0.5)
        if axes.get_legend_handles_labels()[0]:
            _legend(axes)
    axes.set_xlabel("seconds since the start", fontsize=8)
    # Names of parts alone: the points of one are beside each other, and their labels would overlap.
    for part in {point.part: point for point in reversed(record.points)}.values():
        place = (part.started, 0.98)
        caches.annotate(f"{part.part} ", place, fontsize=7, rotation=90, ha="left", va="top", color="0.3")
    return data_uri(figure)
