"""Rows to tables, for the terminal and, as Markdown, for the README."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from serve.bench.engine.plan import IN_TREE, OURS
from serve.bench.engine.profile_steps import CATEGORIES
from serve.bench.engine.rows import Row, latest
from serve.common.tables import ResultTable, tokens

NONE = "–"
Cell = Callable[[Row], str]
Points = dict[tuple[str, str], Row]


def tables(rows: Sequence[Row]) -> list[ResultTable]:
    """All tables for which there are rows."""
    steps = latest(rows, "tpot")
    alone = {key: row for key, row in steps.items() if row["case"]["batch"] == "1"}
    ms, rate = _ms("tpot"), _number("tokens_per_s", 0)
    found = [
        _compared(
            *("Time per output token, batch 1", "context", alone),
            label=lambda case: tokens(case["context"]),
            fields={", ms": ms},
            shared={"floor, ms": _number("floor_ms")},
            better=lambda row: 1 / row["tpot"]["p50_ms"],
        ),
        _compared(  # A larger batch takes longer steps, so what compares is tokens per second.
            *("Time per output token, the largest batch that fits", "context"),
            {key: row for key, row in steps.items() if key not in alone},
            label=lambda case: tokens(case["context"]),
            fields={", requests": _text("requests"), ", ms": ms, ", tokens/s": rate, ", floor ms": _number("floor_ms")},
            better=lambda row: row["tokens_per_s"],
        ),
        _gpu_table(rows),
        _compared(
            *("Requests that run at once", "prompt", latest(rows, "concurrency")),
            label=lambda case: tokens(case["prompt"]),
            fields={"": _text("running")},
            better=lambda row: row["running"],
        ),
        _mixed_table(rows),
        _resume_table(rows),
        _again_table(rows),
        _compared(
            *("Time to the first token", "prompt", latest(rows, "prefill")),
            label=lambda case: tokens(case["prompt"]),
            fields={", ms": _ms("ttft", 1), ", tokens/s": rate},
            better=lambda row: row["tokens_per_s"],
        ),
        _compared(
            *("Tokens read and written per second", "at once: requests × (prompt + answer)"),
            latest(rows, "throughput"),
            label=lambda case: f"{case['requests']} × ({tokens(case['prompt'])} + {case['output']})",
            fields={", s": lambda row: f"{min(row['seconds']):.2f} to {max(row['seconds']):.2f}", ", tokens/s": rate},
            better=lambda row: row["tokens_per_s"],
        ),
        _compared(
            *("Tokens per second with drafts", "requests, drafts, share that is right", latest(rows, "drafts")),
            label=lambda case: (
                f"{case['requests']}, {case['drafts']}, {NONE if case['right'] is None else case['right']}"
            ),
            fields={", step ms": _ms("step"), ", tokens a step": _number("tokens_per_step"), ", tokens/s": rate},
            better=lambda row: row["tokens_per_s"],
        ),
        _ready_table(rows),
        _failures(rows),
    ]
    return [table for table in found if table.cells]


def providers(rows: Sequence[Row]) -> list[str]:
    """Those that have rows, ours first, vLLM's last."""
    names = {row["provider"] for row in rows}
    return sorted(names, key=lambda name: (name == IN_TREE, name != OURS, name))


def _compared(
    title: str,
    first: str,
    points: Points,
    *,
    label: Callable[[dict[str, Any]], str],
    fields: dict[str, Cell],
    better: Callable[[Row], float],
    shared: dict[str, Cell] | None = None,
) -> ResultTable:
    """A line a case: the fields of each provider, what is the same for all, and the ratio of ours to vLLM's own."""
    names = providers(list(points.values()))
    ratio = ["ratio"] * (OURS in names and IN_TREE in names)
    columns = [first, *(f"{name}{field}" for name in names for field in fields), *(shared or {}), *ratio]
    cells = []
    for case in dict.fromkeys(case for _, case in points):
        found = [points.get((name, case)) for name in names]
        line = [label(json.loads(case))]
        line += [cell(row) if row else NONE for row in found for cell in fields.values()]
        line += [cell(next(filter(None, found))) for cell in (shared or {}).values()]
        cells.append(line + [_ratio(points, case, better)] * len(ratio))
    return ResultTable(title, columns, cells)


def _gpu_table(rows: Sequence[Row]) -> ResultTable:
    names = [*(name for name, _ in CATEGORIES), "other"]
    cells = []
    points = latest(rows, "tpot").values()
    for row in sorted(points, key=lambda row: (row["case"]["batch"], row["case"]["context"])):
        profile = row.get("profile", {})
        if "gpu_ms" in profile:
            times = [*(profile["gpu_ms"][name] for name in names), profile["kernel_sum_ms"], profile["gaps_ms"]]
            label = f"{tokens(row['case']['context'])} × {row['requests']}, {row['provider']}"
            cells.append([label, *(f"{time:.3f}" for time in times), f"{profile['kernels']:.0f}"])
    columns = ["ms per step", *names, "sum", "gaps", "kernels"]
    return ResultTable("GPU time of a decode step, context × batch", columns, cells)


def _mixed_table(rows: Sequence[Row]) -> ResultTable:
    columns = ["decoding while prompts arrive", "ITL p50, ms", "ITL p99, ms", "undisturbed, ms", "TTFT p50, ms"]
    cells = [
        [
            f"{row['provider']}, {row['running_decoders']} requests of {tokens(row['case']['context'])}, "
            f"prompts of {tokens(row['case']['prompt'])}"
            + (f", {tokens(limit)} a step" if (limit := row.get("mixed_step_tokens")) else ""),
            *(f"{row['itl'][share]:.2f}" for share in ("p50_ms", "p99_ms")),
            f"{row['itl_undisturbed']['p50_ms']:.2f}",
            f"{row['ttft']['p50_ms']:.1f}",
        ]
        for row in latest(rows, "mixed").values()
    ]
    return ResultTable("Inter-token latency under mixed load", columns, cells)


def _resume_table(rows: Sequence[Row]) -> ResultTable:
    columns = ["first token of", "computed, ms", "resumed, ms", "file not cached, ms", *_ITL_BESIDE]
    cells = [
        [
            tokens(row["case"]["prompt"]),
            *(f"{row[name]['p50_ms']:.1f}" for name in ("computed", "resumed", "resumed_uncached")),
            *_itl_beside(row),
        ]
        for row in latest(rows, "resume").values()
    ]
    return ResultTable("Sessions resumed", columns, cells)


_ITL_BESIDE = ("ITL beside, p50 / p90, ms", "alone, ms")


def _itl_beside(row: Row) -> list[str]:
    """Of requests that decode: no means, for in older rows these hold what passed between two runs of the clock."""
    found = [row[name] for name in ("itl_beside_loads", "itl_undisturbed")]
    return [f"{itl['p50_ms']:.2f} / {itl['p90_ms']:.2f}" for itl in found]


def _again_table(rows: Sequence[Row]) -> ResultTable:
    columns = ["prompts", "host memory, GiB", "disk", "computed, ms", "again, ms", "hits", *_ITL_BESIDE]
    cells = [
        [
            f"{row['provider']}, {row['case']['prompts']} of {tokens(row['case']['prompt'])}",
            f"{row['case']['host_gib']:g}",
            "yes" if row["case"].get("disk") else "no",
            *(f"{row['mean_ms'][name]:.1f}" for name in ("computed", "again")),
            f"{100 * row['hit_share']:.0f} %",
            *_itl_beside(row),
        ]
        for row in latest(rows, "again").values()
    ]
    return ResultTable("Prompts asked again, memory for fewer", columns, cells)


def _ready_table(rows: Sequence[Row]) -> ResultTable:
    started: dict[str, float] = {}
    ready_s: dict[int, float] = {}
    for row in rows:  # of the engine that answered, where a file has several
        if row["bench"] == "engine" and "ready_s" in row:
            started[row["provider"]] = row["ready_s"]
        elif row["bench"] == "ready":
            ready_s[id(row)] = started[row["provider"]]
    cells = [
        [
            f"{row['provider']}, {row['case']['prompts']} prompts, {row['case']['run']} time",
            f"{ready_s[id(row)]:.0f}",
            f"{row['seconds']:.1f}",
            f"{row['worst_step_s'] * 1e3:.0f}",
            str(len(row.get("compiled", ()))),
        ]
        for row in latest(rows, "ready").values()
    ]
    columns = ["after the start", "ready after, s", "all answered, s", "worst step, ms", "kernels compiled"]
    return ResultTable("An engine's first requests, prompts of 20 to 3,000 tokens", columns, cells)


def _failures(rows: Sequence[Row]) -> ResultTable:
    cells = [
        [f"{row['provider']} {row['bench']} {json.dumps(row['case'])}", (row.get("error") or row["skipped"])[-160:]]
        for row in rows
        if "error" in row or "skipped" in row
    ]
    return ResultTable("Not measured", ["what", "why"], cells)


def _ratio(points: Points, case: str, better: Callable[[Row], float]) -> str:
    ours, theirs = points.get((OURS, case)), points.get((IN_TREE, case))
    if ours is None or theirs is None or not better(theirs):
        return NONE
    return f"{better(ours) / better(theirs):.2f}×"


def _text(field: str) -> Cell:
    return lambda row: str(row[field])


def _number(field: str, digits: int = 2) -> Cell:
    return lambda row: NONE if row[field] is None else f"{row[field]:,.{digits}f}"


def _ms(field: str, digits: int = 2) -> Cell:
    return lambda row: f"{row[field]['p50_ms']:,.{digits}f}"
