"""One HTML page of a load test that needs no other file: numbers, pictures, exact commands, versions."""

import json
import shlex
from pathlib import Path
from typing import Any

import jinja2
from load.plots import Detail, pictures
from load.record import Record

COLUMNS = {
    "requests": ("completed", "{:.0f}"),
    "failed": ("failed", "{:.0f}"),
    "requests/s": ("request_throughput", "{:.2f}"),
    "good/s": ("request_goodput", "{:.2f}"),
    "output tok/s": ("output_throughput", "{:.0f}"),
    "TTFT p50": ("p50_ttft_ms", "{:.1f}"),
    "p99": ("p99_ttft_ms", "{:.1f}"),
    "TPOT p50": ("p50_tpot_ms", "{:.2f}"),
    "p99 ": ("p99_tpot_ms", "{:.2f}"),
    "ITL p50": ("p50_itl_ms", "{:.2f}"),
    "p99  ": ("p99_itl_ms", "{:.2f}"),
    "E2EL p99": ("p99_e2el_ms", "{:.0f}"),
}
STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; color: #222 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .2em .7em; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left }
img { max-width: 100% } pre { background: #f5f5f5; padding: .7em; overflow-x: auto } .bad { color: #b00 }
"""
TEMPLATE = """<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{{ record.title }}</title>
<style>{{ style }}</style></head><body>
<h1>{{ record.title }}</h1><p>{{ record.about }}</p>
<p>{{ record.model }}, {{ record.started }}, {{ record.environment.get("GPU") or record.environment.processor }}.
{% if not record.complete %}<b class="bad">Partial: the load test was interrupted after {{ record.points | length }}
points.</b>{% endif %}</p>
{% if record.goodput %}<p>Good requests keep {{ record.goodput | join(", ") }} (ms).</p>{% endif %}
<h2>Numbers</h2><p>Times in milliseconds. TTFT: to the first token. TPOT: mean of the later tokens of a request.
ITL: between two tokens. E2EL: to the last token.</p>
<table><tr><th>point</th>{% for name in columns %}<th>{{ name }}</th>{% endfor %}</tr>
{% for label, cells, error in rows %}<tr><td>{{ label }}</td>
{% if error %}<td colspan="{{ columns | length }}" class="bad">failed: {{ error.splitlines()[-1] }}</td>
{% else %}{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}{% endif %}</tr>{% endfor %}</table>
{% for title, uri in pictures.items() %}<h2>{{ title }}</h2><img alt="{{ title }}" src="{{ uri }}">{% endfor %}
<h2>How it was measured</h2>
<table>{% for name, value in record.environment.items() %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>{% endfor %}
</table>{% if server %}<p>The server:</p><pre>{{ server }}</pre>{% endif %}
<details><summary>Commands</summary>{% for label, words in commands %}<p>{{ label }}</p><pre>{{ words }}</pre>
{% endfor %}</details><details><summary>Scenario</summary><pre>{{ scenario }}</pre></details></body></html>
"""


def cells(result: dict[str, Any]) -> list[str]:
    """One row of the table; a dash where there is no number."""
    values = [(result.get(key), form) for key, form in COLUMNS.values()]
    return [form.format(value) if isinstance(value, int | float) else "–" for value, form in values]


def details(record: Record, folder: Path) -> dict[str, Detail]:
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
    environment = jinja2.Environment(autoescape=True, trim_blocks=True)
    page = environment.from_string(TEMPLATE).render(
        record=record,
        style=STYLE,
        columns=list(COLUMNS),
        rows=[(point.label, cells(point.result), point.error) for point in record.points],
        pictures=pictures(record, details(record, folder)),
        server=shlex.join(record.server_command),
        commands=[(point.label, shlex.join(point.command)) for point in record.points],
        scenario=json.dumps(record.scenario, indent=1),
    )
    path = folder / "report.html"
    path.write_text(page)
    return path
