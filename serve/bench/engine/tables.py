"""Rows to tables, for the terminal and, as Markdown, for the README."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from serve.bench.engine.plan import IN_TREE, OURS
from serve.bench.engine.rows import Row, latest


@dataclass(frozen=True, slots=True)
class ResultTable:
    """A title, column names, and cells as text; the first column is words, the others numbers."""

    title: str
    columns: Sequence[str]
    cells: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """As Markdown."""
        lines = [f"**{self.title}**", "", _line(self.columns), _line(["---", *["---:"] * (len(self.columns) - 1)])]
        return "\n".join([*lines, *map(_line, self.cells)])


def tables(rows: Sequence[Row]) -> list[ResultTable]:
    """All tables for which there are rows."""
    found = [
        _step_table(rows, "1", "Time per output token, batch 1"),
        _step_table(rows, "largest", "Time per output token, the largest batch that fits"),
        _gpu_table(rows),
        _concurrency_table(rows),
        _mixed_table(rows),
        _prefill_table(rows),
        _throughput_table(rows),
        _ready_table(rows),
        _failures(rows),
    ]
    return [table for table in found if table.cells]


def tokens(count: int) -> str:
    """4096 as 4K, 1048576 as 1M."""
    for size, unit in ((1 << 20, "M"), (1 << 10, "K")):
        if count >= size and count % size == 0:
            return f"{count // size}{unit}"
    return f"{count:,}"


def providers(rows: Sequence[Row]) -> list[str]:
    """Those that have rows, ours first, vLLM's last."""
    names = {row["provider"] for row in rows}
    return sorted(names, key=lambda name: (name == IN_TREE, name != OURS, name))


def _step_table(rows: Sequence[Row], batch: str, title: str) -> ResultTable:
    points = {key: row for key, row in latest(rows, "tpot").items() if row["case"]["batch"] == batch}
    names, cases = _axes(points)
    # A larger batch takes longer steps, so what compares is tokens per second.
    by_rate = batch != "1"
    columns = ["context"]
    for name in names:
        columns += [f"{name}, requests", f"{name}, ms"] if by_rate else [f"{name}, ms"]
        columns += [f"{name}, tokens/s"] * by_rate + [f"{name}, floor ms"] * by_rate
    columns += ["floor, ms"] * (not by_rate) + ["ratio"] * _paired(names)
    cells = []
    for case in cases:
        cell = [tokens(json.loads(case)["context"])]
        for name in names:
            row = points.get((name, case))
            fields = [_number(row, lambda r: r["tpot"]["p50_ms"])]
            if by_rate:
                fields = [
                    "–" if row is None else str(row["requests"]),
                    *fields,
                    _number(row, lambda r: r["tokens_per_s"], digits=0),
                    _number(row, lambda r: r["floor_ms"]),
                ]
            cell += fields
        if not by_rate:
            cell.append(_number(next((points[n, case] for n in names if (n, case) in points), None), _floor))
        if _paired(names):
            cell.append(_ratio(points, case, lambda r: r["tokens_per_s"] if by_rate else 1 / r["tpot"]["p50_ms"]))
        cells.append(cell)
    return ResultTable(title, columns, cells)


def _gpu_table(rows: Sequence[Row]) -> ResultTable:
    cells = []
    points = latest(rows, "tpot").values()
    for row in sorted(points, key=lambda row: (row["case"]["batch"], row["case"]["context"])):
        profile = row.get("profile", {})
        if "gpu_ms" in profile:
            times = [*profile["gpu_ms"].values(), profile["kernel_sum_ms"], profile["gaps_ms"]]
            label = f"{tokens(row['case']['context'])} × {row['requests']}, {row['provider']}"
            cells.append([label, *(f"{time:.3f}" for time in times), f"{profile['kernels']:.0f}"])
    columns = ["ms per step", "KDA", "MLA", "MoE", "GEMM", "other", "sum", "gaps", "kernels"]
    order = ["MLA", "KDA", "MoE", "GEMM", "other"]  # the order of the categories' patterns
    columns[1:6] = order
    return ResultTable("GPU time of a decode step, context × batch", columns, cells)


def _concurrency_table(rows: Sequence[Row]) -> ResultTable:
    points = latest(rows, "concurrency")
    names, cases = _axes(points)
    cells = [
        [tokens(json.loads(case)["prompt"])]
        + ["–" if (name, case) not in points else str(points[name, case]["running"]) for name in names]
        + [_ratio(points, case, lambda r: r["running"])] * _paired(names)
        for case in cases
    ]
    return ResultTable("Requests that run at once", ["prompt", *names, *["ratio"] * _paired(names)], cells)


def _mixed_table(rows: Sequence[Row]) -> ResultTable:
    columns = ["decoding while prompts arrive", "ITL p50, ms", "ITL p99, ms", "undisturbed, ms", "TTFT p50, ms"]
    cells = [
        [
            f"{row['provider']}, {row['running_decoders']} requests of {tokens(row['case']['context'])}, "
            f"prompts of {tokens(row['case']['prompt'])}",
            *(f"{row['itl'][share]:.2f}" for share in ("p50_ms", "p99_ms")),
            f"{row['itl_undisturbed']['p50_ms']:.2f}",
            f"{row['ttft']['p50_ms']:.1f}",
        ]
        for row in latest(rows, "mixed").values()
    ]
    return ResultTable("Inter-token latency under mixed load", columns, cells)


def _prefill_table(rows: Sequence[Row]) -> ResultTable:
    points = latest(rows, "prefill")
    names, cases = _axes(points)
    columns = ["prompt"]
    for name in names:
        columns += [f"{name}, ms", f"{name}, tokens/s"]
    cells = []
    for case in cases:
        cell = [tokens(json.loads(case)["prompt"])]
        for name in names:
            row = points.get((name, case))
            cell += [
                _number(row, lambda r: r["ttft"]["p50_ms"], digits=1),
                _number(row, lambda r: r["tokens_per_s"], digits=0),
            ]
        cells.append(cell + [_ratio(points, case, lambda r: r["tokens_per_s"])] * _paired(names))
    return ResultTable("Time to the first token", [*columns, *["ratio"] * _paired(names)], cells)


def _throughput_table(rows: Sequence[Row]) -> ResultTable:
    points = latest(rows, "throughput")
    names, cases = _axes(points)
    columns = ["at once: requests × (prompt + answer)"]
    for name in names:
        columns += [f"{name}, s", f"{name}, tokens/s"]
    cells = []
    for case in cases:
        load = json.loads(case)
        cell = [f"{load['requests']} × ({tokens(load['prompt'])} + {load['output']})"]
        for name in names:
            row = points.get((name, case))
            cell += [
                "–" if row is None else f"{min(row['seconds']):.2f} to {max(row['seconds']):.2f}",
                _number(row, lambda r: r["tokens_per_s"], digits=0),
            ]
        cells.append(cell + [_ratio(points, case, lambda r: r["tokens_per_s"])] * _paired(names))
    return ResultTable("Tokens read and written per second", [*columns, *["ratio"] * _paired(names)], cells)


def _ready_table(rows: Sequence[Row]) -> ResultTable:
    started = {row["provider"]: row["ready_s"] for row in rows if row["bench"] == "engine" and "ready_s" in row}
    cells = [
        [
            f"{row['provider']}, {row['case']['prompts']} prompts, {row['case']['run']} time",
            f"{started[row['provider']]:.0f}",
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


def _axes(points: dict[tuple[str, str], Row]) -> tuple[list[str], list[str]]:
    return providers(list(points.values())), list(dict.fromkeys(case for _, case in points))


def _paired(names: Sequence[str]) -> bool:
    return OURS in names and IN_TREE in names


def _ratio(points: dict[tuple[str, str], Row], case: str, better: Callable[[Row], float]) -> str:
    ours, theirs = points.get((OURS, case)), points.get((IN_TREE, case))
    if ours is None or theirs is None or not better(theirs):
        return "–"
    return f"{better(ours) / better(theirs):.2f}×"


def _floor(row: Row) -> float | None:
    floor: float | None = row["floor_ms"]
    return floor


def _number(row: Row | None, field: Callable[[Row], Any], digits: int = 2) -> str:
    value = None if row is None else field(row)
    return "–" if value is None else f"{value:,.{digits}f}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/').replace(chr(10), ' ') for cell in cells)} |"
