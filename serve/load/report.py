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
    """A number of a point.

    Attributes:
        group: heading above it; columns of one group stand together.
        name: heading.
        key: in the generator's result.
        form: how it is written.
    """

    group: str
    name: str
    key: str
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
STYLE = """
:root { color-scheme: light dark; --line: #ddd; --soft: #f5f5f5; --bad: #b00; --good: #080 }
@media (prefers-color-scheme: dark) { :root { --line: #444; --soft: #222; --bad: #f77; --good: #7c7 } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 74em; padding: 0 1em }
h1, h2 { line-height: 1.2 } h2 { margin: 1.8em 0 .5em; border-bottom: 1px solid var(--line) }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .15em .55em; border-bottom: 1px solid var(--line); white-space: nowrap }
th[colspan] { text-align: center; border-bottom: 0 } td:first-child, th:first-child { text-align: left }
.text :is(th, td) { text-align: left }
.text td + td { white-space: normal; overflow-wrap: anywhere } .pairs td { padding: .3em .8em }
img { width: 100%; background: #fff; border-radius: 4px }
pre { background: var(--soft); padding: .7em; overflow-x: auto }
.bad { color: var(--bad) } .good { color: var(--good) } td.red { color: var(--bad) } td.green { color: var(--good) }
"""
BASE = """<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{{ title }}</title>
<style>{{ style }}</style></head><body><h1>{{ title }}</h1>
{% block body %}{% endblock %}
{% for title, uri in pictures.items() %}<h2>{{ title }}</h2><img alt="{{ title }}" src="{{ uri }}">{% endfor %}
{% block end %}{% endblock %}</body></html>
"""
UNITS = """<p>TTFT: time to the first token. TPOT: mean time of the later tokens of a request. ITL: between two tokens.
E2EL: to the last token.{% if goodput %} Good requests keep {{ goodput | join(", ") }} (ms).{% endif %}</p>"""
REPORT = """{% extends "base" %}{% block body %}<p>{{ record.about }}</p>
<p>{{ record.model }}, {{ record.started }}, {{ record.environment.get("GPU") or record.environment.processor }}.
{% if not record.complete %}<b class="bad">Partial: the load test was interrupted after {{ record.points | length }}
points.</b>{% endif %}</p>
{% if record.verdict %}<h2>Verdict</h2><table class="text"><tr><th>what must hold</th><th>found</th><th>limit</th>
<th></th></tr>{% for check in record.verdict %}<tr><td>{{ check.name }}</td><td>{{ check.found }}</td>
<td>{{ check.limit }}</td>
<td class="{{ "green" if check.passed else "red" }}">{{ "yes" if check.passed else "no" }}</td></tr>{% endfor %}</table>
{% endif %}<h2>Numbers</h2>{% include "units" %}
<div class="wide"><table><tr><th></th>
{% for name, count in groups %}<th colspan="{{ count }}">{{ name }}</th>{% endfor %}</tr>
<tr><th>point</th>{% for column in columns %}<th>{{ column.name }}</th>{% endfor %}</tr>
{% for label, cells, error in rows %}<tr><td>{{ label }}</td>
{% if error %}<td colspan="{{ columns | length }}" class="bad">failed: {{ error.splitlines()[-1] }}</td>
{% else %}{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}{% endif %}</tr>{% endfor %}</table></div>
{% endblock %}{% block end %}<h2>How it was measured</h2>
<table class="text">{% for name, value in record.environment.items() %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>
{% endfor %}</table>{% if server %}<p>The server:</p><pre>{{ server }}</pre>{% endif %}
<details><summary>Commands</summary>{% for label, words in commands %}<p>{{ label }}</p><pre>{{ words }}</pre>
{% endfor %}</details><details><summary>Scenario</summary><pre>{{ scenario }}</pre></details>{% endblock %}
"""
COMPARISON = """{% extends "base" %}{% block body %}<p>Each cell: A → B, and B / A. Green is
better, red worse, by more than {{ noticeable }}.</p>
<h2>The two</h2><table class="text"><tr><th></th><th>A</th><th>B</th></tr>
{% for name, a, b in surroundings %}<tr><td>{{ name }}</td><td>{{ a }}</td><td>{{ b }}</td></tr>{% endfor %}</table>
<h2>Numbers</h2>{% include "units" %}
<div class="wide"><table class="pairs"><tr><th>point</th>{% for name in names %}<th>{{ name }}</th>{% endfor %}</tr>
{% for label, group in groups %}<tr><td>{{ label }}</td>{% for name in names %}
{% set row = group | selectattr("name", "equalto", name) | first %}
{% if row %}<td class="{{ row.style }}">{{ "%.4g" | format(row.first) }} → {{ "%.4g" | format(row.second) }}<br>
<b>{{ "%.2f" | format(row.ratio) }}×</b></td>{% else %}<td>–</td>{% endif %}{% endfor %}</tr>{% endfor %}</table></div>
{% endblock %}
"""
TEMPLATES = {"base": BASE, "units": UNITS, "report": REPORT, "comparison": COMPARISON}


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
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, loader=jinja2.DictLoader(TEMPLATES))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(environment.get_template(name).render(style=STYLE, **values))
    return path
