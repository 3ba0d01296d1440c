"""HTML pages that need no other file: of one load test, numbers, pictures, exact commands, versions; and of two."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2

from serve.load import compare, plots
from serve.load.record import Measured, Record


@dataclass(frozen=True, slots=True)
class Column:
    """A number of a point."""

    group: str  # heading above it; columns of one group stand together
    name: str
    key: str  # in the generator's result
    form: str


COLUMNS = (
    Column("requests", "done", "completed", "{:.0f}"),
    Column("requests", "failed", "failed", "{:.0f}"),
    Column("per second", "requests", "request_throughput", "{:.2f}"),
    Column("per second", "good ones", "request_goodput", "{:.2f}"),
    Column("per second", "output tokens", "output_throughput", "{:.0f}"),
    Column("TTFT, ms", "p50", "p50_ttft_ms", "{:.1f}"),
    Column("TTFT, ms", "p99", "p99_ttft_ms", "{:.1f}"),
    Column("TPOT, ms", "p50", "p50_tpot_ms", "{:.2f}"),
    Column("TPOT, ms", "p99", "p99_tpot_ms", "{:.2f}"),
    Column("ITL, ms", "p50", "p50_itl_ms", "{:.2f}"),
    Column("ITL, ms", "p99", "p99_itl_ms", "{:.2f}"),
    Column("E2EL, ms", "p99", "p99_e2el_ms", "{:.0f}"),
)
TEMPLATES = Path(__file__).with_name("templates")


def cells(result: dict[str, Any], columns: Sequence[Column] = COLUMNS) -> list[str]:
    """One row of the table; a dash where there is no number."""
    values = [(result.get(column.key), column.form) for column in columns]
    return [form.format(value) if isinstance(value, int | float) else "–" for value, form in values]


def columns_of(points: Sequence[Measured]) -> list[Column]:
    """The columns in which some point has a number."""
    return [column for column in COLUMNS if any(point.get(column.key) is not None for point in points)]


def details(record: Record, folder: Path) -> dict[str, plots.Detail]:
    """What the generator saved of the requests of each mixed point."""
    found = {}
    for point in record.points:
        path = folder / point.file
        if point.kind == "mixed" and point.result and path.is_file():
            values = json.loads(path.read_text())
            found[point.label] = {name: values[name] for name in ("start_times", "ttfts", "itls", "input_lens")}
    return found


def write(record: Record, folder: Path) -> Path:
    """Write `report.html` into the folder of a load test and return its path."""
    columns = columns_of(record.points)
    groups = list(dict.fromkeys(column.group for column in columns))
    return _page(
        folder / "report.html",
        "report",
        title=record.title,
        record=record,
        goodput=record.goodput,
        groups=[(group, sum(column.group == group for column in columns)) for group in groups],
        columns=columns,
        rows=[(point.label, cells(point.result, columns), point.error) for point in record.points],
        pictures=plots.pictures(record, details(record, folder)),
        server=shlex.join(record.server_command),
        commands=[(point.label, shlex.join(point.command)) for point in record.points],
        scenario=json.dumps(record.scenario, indent=1),
    )


def write_comparison(first: Record, second: Record, path: Path) -> Path:
    """Write a page of two load tests side by side and return its path.

    Raises:
        RecordError: they have no point in common.
    """
    rows = compare.differences(first, second)
    commands = shlex.join(first.server_command), shlex.join(second.server_command)
    return _page(
        path,
        "comparison",
        title=f"{first.title}: A against B",
        noticeable=f"{compare.NOTICEABLE:.0%}",
        goodput=first.goodput,
        surroundings=[
            ("started", first.started, second.started),
            ("model", first.model, second.model),
            *([("server", *commands)] if any(commands) else []),
            *compare.surroundings(first, second),
        ],
        groups=[(label, list(group)) for label, group in groupby(rows, key=lambda row: row.label)],
        names=list(dict.fromkeys(row.name for row in rows)),
        pictures=plots.comparison(first, second),
    )


def _page(path: Path, name: str, **values: Any) -> Path:
    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, loader=loader)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(environment.get_template(f"{name}.html").render(**values))
    return path
