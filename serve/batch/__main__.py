"""Offline batch: a file of requests in OpenAI's batch format in, a file of answers out, whatever happens in between.

    python -m serve.batch questions.jsonl answers.jsonl --model configs/models/recall -- --dtype float32

Each line of the input is `{"custom_id": ..., "method": "POST", "url": "/v1/chat/completions", "body": {...}}`; any
endpoint of the server that answers JSON will do. An answer is appended to the output and synced to the disk as soon as
it is there, in no particular order. After a crash, `kill -9` or Ctrl-C run the same command again: what is answered is
skipped, the rest is done, no id is lost or written twice. Lines that are no requests, or that the server refuses, are
in `answers.errors.jsonl` with the reason and the line itself; a later run tries them again.

Memory does not grow with the sizes of the requests: the input is read as it is needed. Of each line 9 bytes are kept,
and 8 of each answer that is there already; comparing them takes more for a moment. Measured with a million lines: 67
MB, and 132 MB to resume when 700,000 of them are done; 6 and 10 seconds.

Why not `vllm run-batch`: it reads the whole file into one string, makes a coroutine of every line at once, and writes
all answers after the last one, so a crash loses everything; one line that is not JSON ends the run before it starts. It
has no endpoint for plain completions. Here `vllm serve` does the work, in a process of its own or wherever --url says.
"""

import asyncio
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from serve.batch.progress import BatchProgress
from serve.batch.requests import BatchError, Mark, Survey, left_to_do, survey
from serve.batch.results import Results
from serve.batch.runner import Run, client, send
from serve.common.server import Server, ServerError, interrupt_on_sigterm, models, root_of

START_SECONDS = 3600  # weights of 100 GB from a network disk
KEY = os.environ.get("OPENAI_API_KEY", "none")
FAILED, UNFINISHED, INTERRUPTED = 1, 2, 130

console = Console(highlight=False, soft_wrap=True)


def main(
    source: Annotated[Path, typer.Argument(metavar="INPUT", exists=True, dir_okay=False, help="Requests, JSONL.")],
    output: Annotated[Path, typer.Argument(dir_okay=False, help="Answers, JSONL; continued if it exists.")],
    options: Annotated[list[str] | None, typer.Argument(help="After `--`: options for `vllm serve`.")] = None,
    model: Annotated[str | None, typer.Option(help="Checkpoint to serve; the server is stopped at the end.")] = None,
    url: Annotated[str | None, typer.Option(help="A server that runs already, such as http://127.0.0.1:8000.")] = None,
    concurrency: Annotated[
        int, typer.Option(min=1, help="Requests at once; best above the server's --max-num-seqs.")
    ] = 256,
    errors: Annotated[
        Path | None, typer.Option(help="File for lines that failed; by default beside OUTPUT.", show_default=False)
    ] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that one answer may take.")] = 3600,
) -> None:
    """Answer a file of requests with vLLM; run it again to go on after a crash.

    Exit status: 0 all lines are answered, 1 some failed, 2 the run could not finish, 130 interrupted.
    OPENAI_API_KEY is sent to the server if it is set.
    """
    interrupt_on_sigterm()
    if (model is None) == (url is None):
        raise typer.BadParameter("give either --model or --url")
    if url and options:
        raise typer.BadParameter("options after `--` are for a server started here, not for --url")
    errors = errors or output.with_name(f"{output.stem}.errors.jsonl")
    if len({source.resolve(), output.resolve(), errors.resolve()}) < 3:
        raise typer.BadParameter("input, output and --errors must be three files")
    try:
        with Results(output, errors) as results:
            found = survey(source, results.done)
            _describe(found, results, output)
            total = found.count(Mark.LEFT, Mark.DONE, Mark.BAD, Mark.DOUBLE)
            with _server(model, url, options or [], found, output) as base:
                progress = BatchProgress(console, total, found.count(Mark.DONE))
                try:
                    with progress:
                        asyncio.run(_work(base, source, found, results, progress, concurrency, timeout))
                finally:
                    _summarise(progress, output, errors)
    except (BatchError, ServerError) as error:
        console.print(Text(f"offline: {error}", style="red"))
        raise typer.Exit(UNFINISHED) from error
    except KeyboardInterrupt as error:
        console.print("Interrupted. Run the same command again to go on.")
        raise typer.Exit(INTERRUPTED) from error
    raise typer.Exit(FAILED if progress.failed else 0)


def _describe(found: Survey, results: Results, output: Path) -> None:
    if results.torn_bytes:
        console.print(f"Cut {results.torn_bytes} bytes of a torn line off {output}.")
    todo, done, bad, double = (found.count(mark) for mark in (Mark.LEFT, Mark.DONE, Mark.BAD, Mark.DOUBLE))
    console.print(f"{todo:,} requests to do, {done:,} done already, {bad:,} bad lines, {double:,} double ids.")
    for complaint in found.complaints:
        console.print(Text(f"  {complaint}", style="yellow"))


@contextmanager
def _server(model: str | None, url: str | None, options: list[str], found: Survey, output: Path) -> Iterator[str]:
    """The base URL of a server that serves the models the batch asks for."""
    asked = {name for name in found.models if name is not None}
    if not found.count(Mark.LEFT):
        yield url or ""
    elif url:
        url = root_of(url)
        _refuse_other_models(url, asked)
        yield url
    else:
        assert model
        # One name in the file is what the user calls the model; with several the answers would come from the wrong one.
        named = any(word.split("=")[0] == "--served-model-name" for word in options)
        name = next(iter(asked)) if len(asked) == 1 and not named else None
        log = output.with_name(f"{output.stem}.server.log")
        with Server(model, log, *options, name=name, environment={}, dies_with_us=True) as server:
            server.wait_ready(START_SECONDS, console)
            _refuse_other_models(server.url, asked)
            yield server.url


def _refuse_other_models(url: str, asked: set[str]) -> None:
    served = {model["id"] for model in models(url, KEY)}
    if asked - served:
        raise BatchError(
            f"the requests ask for {sorted(asked - served)}, the server has {sorted(served)}. Change `model` in the "
            "bodies, or give the server their names: -- --served-model-name NAME ..."
        )


async def _work(
    url: str, source: Path, found: Survey, results: Results, progress: BatchProgress, concurrency: int, timeout: float
) -> None:
    async with client(url, KEY, concurrency, timeout) as openai:
        run = Run(left_to_do(source, found), lambda request: send(openai, request), results, progress.advance)
        try:
            await run.run(concurrency)
        except* (BatchError, OSError) as group:
            first = group.exceptions[0]
            raise BatchError(f"{first}. Run the same command again to go on.") from first


def _summarise(progress: BatchProgress, output: Path, errors: Path) -> None:
    seconds = max(progress.seconds, 1e-9)
    console.print(
        f"{progress.answered:,} answered in {seconds:,.1f} s: {progress.answered / seconds:,.1f} requests/s, "
        f"{progress.output_tokens / seconds:,.0f} output and {progress.prompt_tokens / seconds:,.0f} prompt tokens/s. "
        f"Answers: {output}"
    )
    if progress.failed:
        console.print(Text(f"{progress.failed:,} failed; the lines and why: {errors}", style="yellow"))


if __name__ == "__main__":
    sys.exit(typer.run(main))
