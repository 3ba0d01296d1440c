"""Load test: a scenario against a server, with vLLM's own load generator, and one HTML page of what was measured.

    python -m serve.load                                  # `quick`: starts the recall checkpoint, under 4 minutes
    python -m serve.load soak                             # half an hour; passes or fails
    python -m serve.load steady-chat --url http://127.0.0.1:8000 --goodput ttft:500 --goodput tpot:50
    python -m serve.load --compare before/run.json after/run.json

`vllm bench serve` (or GuideLLM, where a part of the scenario says so) sends the requests and does the statistics; this
script words its command lines, samples /metrics meanwhile, and draws. The folder has report.html, run.json, and what
the generator wrote for each point. Ctrl-C ends the point that runs and writes the report of those before it.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from serve.common.paths import ROOT
from serve.common.server import Server, ServerError, interrupt_on_sigterm, models, root_of
from serve.load import compare as comparison
from serve.load import record as records
from serve.load import report, verdict
from serve.load.generator import GeneratorError, Target, command, result_name, run
from serve.load.record import Record, RecordError
from serve.load.scenario import Point, Scenario, ScenarioError, points, read
from serve.load.scrape import Scraper

SCENARIOS = Path(__file__).with_name("scenarios")
START_SECONDS = 3600
SHOWN = {"output tok/s": "output_throughput", "TTFT p50 ms": "p50_ttft_ms", "TPOT p50 ms": "p50_tpot_ms"}
FAILED, UNUSABLE, INTERRUPTED = 1, 2, 130

console = Console(highlight=False, soft_wrap=True)


def main(
    scenario: Annotated[str, typer.Argument(help="A shipped scenario by name, or a YAML file.")] = "quick",
    url: Annotated[str | None, typer.Option(help="A server that runs; without it the scenario's is started.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="If the server's own name for the model is no help.")] = None,
    goodput: Annotated[list[str] | None, typer.Option(help="Objective in ms, such as ttft:500; repeatable.")] = None,
    pid: Annotated[int | None, typer.Option(help="Process of the server at --url, to watch its memory.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the results.", show_default=False)] = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Two run.json, side by side on a page; nothing is measured.")
    ] = None,
) -> None:
    """Put load on a server and report what it does.

    Exit status: 0 all points are measured, 1 some failed or a soak's verdict is no, 2 nothing could start, 130
    interrupted.
    """
    interrupt_on_sigterm()
    try:
        if compare:
            first, second = (records.load(path) for path in compare)
            console.print(comparison.table(first, second))
            folder = output or Path("load-results") / f"compare-{time.strftime('%Y%m%d-%H%M%S')}"
            console.print(str(report.write_comparison(first, second, folder / "compare.html")))
            return
        path = Path(scenario) if scenario.endswith((".yaml", ".yml")) else SCENARIOS / f"{scenario}.yaml"
        if not path.exists():
            shipped = ", ".join(sorted(found.stem for found in SCENARIOS.glob("*.yaml")))
            raise ScenarioError(f"there is no scenario {scenario!r}: shipped are {shipped}; or name a .yaml file")
        plan = read(path)
        folder = (output or Path("load-results") / f"{path.stem}-{time.strftime('%Y%m%d-%H%M%S')}").resolve()
        if (folder / "run.json").exists():
            raise ScenarioError(f"{folder} has a load test already; choose another --output")
        folder.mkdir(parents=True, exist_ok=True)
        if plan.soak and url and not pid:
            raise ScenarioError(f"{plan.title!r} judges the server's memory; give --pid with --url, or leave both out")
        with _target(plan, url, tokenizer, tuple(goodput or ()), folder) as (target, started, started_pid):
            record = _measure(plan, target, started, folder, pid or started_pid)
    except (ScenarioError, ServerError, RecordError) as error:
        console.print(Text(f"load test: {error}", style="red"))
        raise typer.Exit(UNUSABLE) from error
    except KeyboardInterrupt as error:
        raise typer.Exit(INTERRUPTED) from error
    if not record.complete:
        raise typer.Exit(INTERRUPTED)
    failed = any(point.error for point in record.points) or not all(check["passed"] for check in record.verdict)
    raise typer.Exit(FAILED if failed else 0)


@contextmanager
def _target(
    plan: Scenario, url: str | None, tokenizer: str | None, goodput: tuple[str, ...], folder: Path
) -> Iterator[tuple[Target, list[str], int | None]]:
    """The server to ask; its command and its process if we started it."""
    if url:
        yield _ask(root_of(url), tokenizer, goodput), [], None
        return
    if plan.server is None:
        raise ScenarioError(f"{plan.title!r} names no server to start; give --url")
    model = ROOT / plan.server.model if (ROOT / plan.server.model).exists() else plan.server.model
    log = folder / "server.log"
    options = [str(ROOT / word) if (ROOT / word).is_file() else word for word in plan.server.options]
    environment = plan.server.environment
    name = Path(plan.server.model).name
    with Server(model, log, *options, name=name, environment=environment, dies_with_us=True) as server:
        server.wait_ready(START_SECONDS, console)
        yield _ask(server.url, tokenizer, goodput), server.command, server.process.pid


def _ask(url: str, tokenizer: str | None, goodput: tuple[str, ...]) -> Target:
    model = models(url)[0]
    return Target(url, model["id"], tokenizer or model.get("root") or model["id"], goodput)


def _measure(plan: Scenario, target: Target, server_command: list[str], folder: Path, pid: int | None = None) -> Record:
    """Run all points; write the record after each and the report at the end, even after Ctrl-C."""
    every = points(plan)
    for point in every:  # all of them first: errors show before the load
        command(point.at(1.0), target, folder)
    if plan.soak:
        verdict.empty_cache(target.url)
    record = records.new(plan, target, server_command)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Scraper(target.url, plan.sample_seconds, pid if plan.soak else None) as scraper:
        try:
            with Progress(*columns, console=console) as progress:
                done = progress.add_task(plan.title, total=len(every))
                for point in every:
                    record.points.append(_point(point, record, target, folder, scraper, progress))
                    record.samples = list(scraper.samples)
                    records.save(record, folder / "run.json")
                    progress.advance(done)
            if plan.soak:
                end = verdict.drain(target.url, target.model)
                record.samples = list(scraper.samples)
                record.verdict = verdict.judge(record, plan.soak.part, plan.soak.memory_growth, end)
            record.complete = True
        except KeyboardInterrupt:
            console.print(f"Interrupted: the report has the {len(record.points)} points before.")
    record.samples = list(scraper.samples)
    records.save(record, folder / "run.json")
    for check in record.verdict:
        mark = "yes" if check["passed"] else "NO"
        words = f"{check['name']}: {mark}. {check['found']} (limit: {check['limit']})"
        console.print(Text(words, "" if check["passed"] else "red"))
    console.print(f"{report.write(record, folder)}\n{folder / 'run.json'}")
    return record


def _point(
    point: Point, record: Record, target: Target, folder: Path, scraper: Scraper, progress: Progress
) -> records.Measured:
    """Measure one point; a failure is part of the result."""
    before, began = scraper.latest("finished"), scraper.now
    found = records.measured(point, [], began, began)
    task = progress.add_task(f"  {point.label}")
    try:
        if point.share:
            point = point.at(record.limit(point.part.rate_of or ""))
        words = command(point, target, folder)
        found = records.measured(point, words, began, began)
        progress.update(task, description=f"  {point.label}", total=point.num_requests)
        numbers = run(
            words, point, folder, lambda: progress.update(task, completed=scraper.latest("finished") - before)
        )
        found.result = records.without_root(numbers)
        found.file = result_name(point)
    except (GeneratorError, RecordError) as error:
        found.error = str(error)
    found.ended = scraper.now
    progress.remove_task(task)
    values = ((name, found.get(key)) for name, key in SHOWN.items())
    shown = ", ".join(f"{name} {value:.4g}" for name, value in values if value is not None)
    took = f"({found.ended - found.started:.0f} s)"
    progress.console.print(Text(f"  {point.label}: {found.error or shown} {took}", "red" if found.error else ""))
    return found


if __name__ == "__main__":
    sys.exit(typer.run(main))
