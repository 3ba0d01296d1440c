"""Train the models of the synthetic tasks: `python -m serve.eval.train one mqar --out DIR`, or all of them."""

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer

from serve.common.options import refuse_unknown
from serve.eval import checkpoint, training
from serve.eval.tasks import TASKS

SECONDS_TO_MEASURE = 45
"""Kept back by `all` for loading libraries and measuring the trained models."""
app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Minutes = Annotated[float, typer.Option(help="Time limit; the schedule is stretched to it.")]


def device_name(device: str) -> str:
    """What the model was trained on."""
    return torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()


@app.command()
def one(
    name: Annotated[str, typer.Argument(metavar="TASK", help=", ".join(TASKS))],
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint.")],
    device: Device = "cpu",
    seed: int = training.Recipe.seed,
    steps: Annotated[int, typer.Option(help="Optimiser steps at most.")] = training.Recipe.steps,
    minutes: Minutes = training.Recipe.seconds / 60,
    tokens: Annotated[int, typer.Option(help="Tokens in a batch.")] = training.Recipe.tokens,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = training.Recipe.lr,
    max_length: Annotated[int, typer.Option(help="Of training sequences; 512 and its halves down to 32.")] = 512,
    start_from: Annotated[Path | None, typer.Option(help="Go on from this checkpoint, where shapes are equal.")] = None,
    mla_dropout: Annotated[
        float, typer.Option(help="Share of sequences that go without the MLA layer.", min=0, max=1)
    ] = training.Recipe.mla_dropout,
    heads_of_48b: Annotated[
        bool, typer.Option("--heads-of-48b", help="32 KDA heads, 32 MLA heads over latents of 512: for GPUs.")
    ] = False,
) -> None:
    """Train one task's model from one seed, measure it, and write its checkpoint."""
    refuse_unknown("TASK", [name], TASKS)
    task = TASKS[name]
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(seed)
    lengths = tuple(n for n in training.Recipe.lengths if n <= max_length)
    recipe = training.Recipe(
        seed=seed,
        steps=steps,
        seconds=60 * minutes,
        tokens=tokens,
        lr=lr,
        lengths=lengths,
        probe_lengths=lengths[-2:],
        mla_dropout=mla_dropout,
    )
    model = checkpoint.build_model(task, start_from, heads_of_48b).to(device)
    start = time.perf_counter()
    curve = training.train(model, task, recipe, f"{name}-s{seed}")
    seconds = time.perf_counter() - start
    torch.set_float32_matmul_precision("highest")
    measured = training.final_accuracy(model, task, recipe)
    model.cpu()
    checkpoint.save(model, task, out, heads_of_48b)
    result: dict[str, Any] = {
        "task": name,
        "command": shlex.join(["python", "-m", "serve.eval.train", *sys.argv[1:]]),
        "device": device_name(device),
        "parameters": model.num_parameters(),
        "seconds": round(seconds),
        "steps": curve.step[-1],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accuracy": measured,
        **training.as_json(recipe, curve),
    }
    if start_from is not None:
        result["started_from"] = json.loads((start_from / "training.json").read_text())
    (out / "training.json").write_text(json.dumps(result, indent=1) + "\n")
    for condition, shares in measured.items():
        text = ", ".join(f"{length}: {share:.4f}" for length, share in shares.items())
        typer.echo(f"{name}-s{seed} done, step {curve.step[-1]}, {condition}: {text}")


@app.command("all")
def everything(
    out: Annotated[Path, typer.Option(help="One folder a run is made in it.")],
    device: Device = "cuda",
    minutes: Annotated[float, typer.Option(help="For everything, measuring included.")] = 7.0,
    seeds: Annotated[int, typer.Option(help="Runs of every task, each from a seed of its own.")] = 2,
    first_seed: Annotated[int, typer.Option(help="Seed of the first run; the others follow.")] = 0,
    tokens: Annotated[int, typer.Option(help="Tokens in a batch.")] = training.Recipe.tokens,
    max_length: Annotated[int, typer.Option(help="Of training sequences.")] = 512,
) -> None:
    """Train all tasks beside each other, a process each. Exits with 1 if one fails."""
    out.mkdir(parents=True, exist_ok=True)
    left = 60 * minutes - SECONDS_TO_MEASURE
    if left <= 0:
        raise typer.BadParameter(f"--minutes {minutes}: {SECONDS_TO_MEASURE} seconds are kept for measuring.")
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    runs: dict[str, subprocess.Popen[bytes]] = {}
    for seed in range(first_seed, first_seed + seeds):
        for name in TASKS:
            label = f"{name}-s{seed}"
            options = {"out": out / label, "device": device, "seed": seed, "minutes": f"{left / 60:.3f}"}
            options |= {"tokens": tokens, "max-length": max_length}
            command = [sys.executable, "-m", "serve.eval.train", "one", name]
            command += [f"--{option}={value}" for option, value in options.items()]
            # One GPU for each run, in turns.
            gpu = {"CUDA_VISIBLE_DEVICES": str(len(runs) % gpus)} if gpus > 1 else {}
            runs[label] = subprocess.Popen(command, env=os.environ | gpu)
    failed = [label for label, run in runs.items() if run.wait() != 0]
    if failed:
        typer.echo(f"failed: {', '.join(failed)}", err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
