"""Evaluate the shipped models of the synthetic tasks through vLLM: accuracy by length in every way of serving them.

`run` asks all questions in all ways and prints a table; `plot` draws its file; `curves` draws how the models were
trained; `long` reads a context of a million tokens and asks for what was said in it.
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer

from serve.common.environment import ENGINE, UNCOMPILED, prepare
from serve.common.options import refuse_unknown
from serve.common.paths import RESULTS, SYNTHETIC
from serve.common.rows import save
from serve.common.tables import ResultTable

TASKS = ("palindrome", "mqar", "stack", "registers", "needle")
LENGTHS = [256, 512, 1024, 2048]
TRANSFORMERS = "transformers"
ROUNDED = {
    "bfloat16": ("one-shot", {"dtype": "bfloat16"}),
    "bfloat16, decoded": ("all at once", {"dtype": "bfloat16"}),
    "states in bfloat16, decoded": ("all at once", {"state_dtype": "bfloat16"}),
    "states in float16, decoded": ("all at once", {"state_dtype": "float16"}),
    "all in bfloat16, decoded": ("all at once", {"dtype": "bfloat16", "state_dtype": "bfloat16"}),
}
"""Modes that round more than float32 does: how questions are asked, and of which engine. Answers may differ there."""
ON_CPU = ("bfloat16",)
"""Those a CPU serves; of states in other dtypes than float32 only GPUs have kernels."""
MUST_REACH = {256: 0.99, 512: 0.99}
"""Accuracy in float32, by length."""
NOISE = 2e-3
"""Nats between the two best tokens below which either may be the answer: log-probabilities are equal to 1e-3."""
app = typer.Typer(add_completion=False, no_args_is_help=True)
Json = Annotated[Path | None, typer.Option("--json", help="Write all numbers to this file.")]
Only = Annotated[list[str] | None, typer.Option("--task", help=f"{', '.join(TASKS)}; may be repeated. Default: all.")]


@app.callback(help=__doc__)
def main() -> None:
    """Prepare the process for its engines, before vLLM is imported."""
    import torch  # first: its own threads are all cores, those of an engine are what the variable says

    prepare(ENGINE | UNCOMPILED)
    if torch.cuda.is_available():
        # Layers are imported before an engine is made, see `kimi_vllm.graph_breaks`.
        prepare({"VLLM_USE_BREAKABLE_CUDAGRAPH": "1"})


def _write(path: Path, result: dict[str, Any]) -> None:
    command = shlex.join(["python", "-m", "serve.eval", *sys.argv[1:]])
    save(path, result | {"command": command}, "torch", "transformers")


def _by_transformers(checkpoint: Path, questions: Any) -> Any:
    """The answers of transformers' own model, in float32."""
    import torch
    from transformers import KimiLinearForCausalLM
    from transformers import logging as transformers_logging

    from serve.eval import training
    from serve.eval.questions import Answers, Run

    transformers_logging.set_verbosity_error()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.allow_tf32 = False  # its convolutions would round their operands
    model = KimiLinearForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).to(device).eval()
    answers = []
    with torch.no_grad():
        for question in questions:
            logits = training.forward(model, torch.tensor([question.tokens], device=device), chunk_size=16)
            best = logits[0, question.positions].topk(2)
            answers.append(Answers(best.indices[:, 0].tolist(), (best.values[:, 0] - best.values[:, 1]).tolist()))
    return Run(answers)


def _compare(questions: Any, answers: Any, plain: Any) -> dict[str, dict[str, Any]]:
    """By length: how many questions, right answers, and answers that differ from the plain ones, with their margins."""
    found: dict[str, dict[str, Any]] = {}
    for question, given, expected in zip(questions, answers, plain, strict=True):
        row = found.setdefault(str(len(question.tokens)), {"asked": 0, "right": 0, "differ": 0, "margin": 0.0})
        row["asked"] += len(question.positions)
        row["right"] += given.right(question)
        for ours, theirs, margin in zip(given.tokens, expected.tokens, expected.margins, strict=True):
            if ours != theirs:
                row["differ"] += 1
                row["margin"] = round(max(row["margin"], margin), 6)
    return found


def faults(result: dict[str, Any]) -> list[str]:
    """What the numbers of `run` must not say."""
    found = []
    for task, modes in result["tasks"].items():
        for mode, rows in modes.items():
            for length, row in rows.items():
                what = f"{task}, {length} tokens, {mode}"
                share = row["right"] / row["asked"]
                theirs = modes[TRANSFORMERS][length]
                if mode in ROUNDED:
                    continue
                if share < MUST_REACH.get(int(length), 0):
                    found.append(f"{what}: {share:.4f} right")
                if row["margin"] > NOISE:
                    found.append(f"{what}: an answer differs where one-shot was sure by {row['margin']} nats")
                if abs(share - theirs["right"] / theirs["asked"]) > 1e-3:
                    found.append(
                        f"{what}: {share:.4f} right, but {theirs['right'] / theirs['asked']:.4f} in transformers"
                    )
    return found


def _table(task: str, modes: dict[str, Any]) -> ResultTable:
    """Accuracy by length and mode; in brackets answers that are not one-shot's."""
    cells = [
        [mode, *(f"{row['right'] / row['asked']:.2%} ({row['differ']})" for row in rows.values())]
        for mode, rows in modes.items()
    ]
    columns = ["mode", *(f"{length} tokens" for length in next(iter(modes.values())))]
    return ResultTable(f"{task}: right answers, and (how many differ from one-shot)", columns, cells)


def _ask(name: str, models: Path, lengths: Sequence[int], sequences: int) -> dict[str, Any]:
    """One task in all modes: what `_compare` found, by mode."""
    import torch

    from serve.eval import questions as asking
    from serve.eval.tasks import TASKS as ALL_TASKS

    start = time.perf_counter()
    questions = asking.questions_of(ALL_TASKS[name], asking.counts_of(lengths, sequences))
    runs = {TRANSFORMERS: _by_transformers(models / name, questions)}
    with asking.serving(models / name, max(lengths)) as running:
        for mode, ask in asking.MODES.items():
            runs[mode] = ask(running, questions)
            typer.echo(f"{name}: {mode}, {time.perf_counter() - start:.0f} s", err=True)
    rounded = ROUNDED if torch.cuda.is_available() else ON_CPU
    for options, same in groupby(rounded, lambda mode: ROUNDED[mode][1]):
        with asking.serving(models / name, max(lengths), **options) as running:
            for mode in same:
                runs[mode] = asking.MODES[ROUNDED[mode][0]](running, questions)
                typer.echo(f"{name}: {mode}, {time.perf_counter() - start:.0f} s", err=True)
    plain = runs["one-shot"].answers
    return {mode: _compare(questions, run.answers, plain) for mode, run in runs.items()}


def _beside(names: Sequence[str], jobs: int, options: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What `run` finds for each task, in processes of their own, so many at once."""

    def one(name: str, file: Path) -> dict[str, Any]:
        command = [sys.executable, "-m", "serve.eval", "run", "--task", name, "--json", str(file), *options]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
        if not file.exists():  # faults alone end with 1 too, and are found again in what was measured
            raise RuntimeError(f"{name}: exit status {done.returncode}")
        found: dict[str, Any] = json.loads(file.read_text())
        return found

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(lambda name: one(name, Path(folder) / f"{name}.json"), names)


@app.command()
def run(
    task: Only = None,
    length: Annotated[
        list[int] | None,
        typer.Option(help=f"Tokens of a sequence; may be repeated. Default: {', '.join(map(str, LENGTHS))}.", min=256),
    ] = None,
    sequences: Annotated[int, typer.Option(help="Of a task, all lengths together.", min=1, max=64)] = 64,
    file: Json = None,
    models: Annotated[Path, typer.Option(help="Folder with a checkpoint for every task.")] = SYNTHETIC,
    jobs: Annotated[int, typer.Option(help="Tasks at once, a process each.", min=1)] = 1,
) -> None:
    """Ask every model in every mode, and transformers; exits with 1 if answers are not what they must be."""
    lengths = sorted(set(length or LENGTHS))
    if sequences < len(lengths):
        raise typer.BadParameter(f"--sequences {sequences}: at least one for each of {len(lengths)} lengths.")
    result: dict[str, Any] = {"bench": "synthetic", "sequences": sequences, "tasks": {}}
    names = task or TASKS
    refuse_unknown("--task", names, TASKS)
    start, cpu = time.perf_counter(), 0.0
    if jobs > 1:
        options = [f"--length={n}" for n in lengths] + [f"--sequences={sequences}", f"--models={models}"]
        found = _beside(names, jobs, options)
    else:
        found = ({"tasks": {name: _ask(name, models, lengths, sequences)}} for name in names)
    before = time.process_time()
    for part in found:
        result["tasks"] |= part["tasks"]
        cpu += part.get("seconds", {}).get("cpu", 0)
        for name, modes in part["tasks"].items():
            _table(name, modes).show()
        typer.echo(f"{time.perf_counter() - start:.0f} s so far")
    cpu += time.process_time() - before
    result["seconds"] = {"wall": round(time.perf_counter() - start), "cpu": round(cpu)}
    if file is not None:
        _write(file, result)
    if wrong := faults(result):
        for fault in wrong:
            typer.secho(fault, fg="red")
        raise typer.Exit(1)


@app.command()
def plot(
    file: Annotated[Path, typer.Argument(help="What `run --json` wrote.")] = RESULTS / "synthetic-2core.json",
    png: Annotated[Path, typer.Argument(help="The picture.")] = RESULTS / "synthetic-2core.png",
) -> None:
    """Draw accuracy against length, one line a mode."""
    from serve.eval import plots

    plots.accuracy(json.loads(file.read_text())["tasks"], png)


@app.command()
def curves(png: Annotated[Path, typer.Argument(help="The picture.")] = SYNTHETIC / "training.png") -> None:
    """Draw the training curves of the shipped checkpoints, and of another seed."""
    from serve.eval import plots

    found, others = (
        {name: json.loads((SYNTHETIC / name / file).read_text()) for name in TASKS}
        for file in ("training.json", "training-seed1.json")
    )
    plots.training({name: run.get("started_from", run) for name, run in found.items()}, others, png)


@app.command()
def long(
    tokens: Annotated[int, typer.Option(help="Of the context.")] = 1_000_000,
    chunk: Annotated[int, typer.Option(help="Tokens in a step.")] = 8192,
    threads: Annotated[int, typer.Option(help="Of torch and of our kernels.")] = os.cpu_count() or 1,
    file: Json = None,
    model: Annotated[Path, typer.Option(help="Checkpoint of the needle task.")] = SYNTHETIC / "needle",
    dtype: Annotated[str, typer.Option(help="As for `vllm serve`.")] = "float32",
    state_dtype: Annotated[str, typer.Option(help="kimi.state_dtype")] = "float32",
) -> None:
    """Read a context of needles at 1 %, 50 % and 99 % in chunks and ask for each; exits with 1 for a wrong answer."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    from serve.eval import long_stream

    result = long_stream.read_and_ask(model, tokens, chunk, threads, dtype=dtype, state_dtype=state_dtype)
    long_stream.table(result).show()
    if file is not None:
        _write(file, result)
    if any(asked["answer"] != asked["right"] for asked in result["asked"]):
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
