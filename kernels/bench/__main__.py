"""``python -m kimi_vllm.kernels.bench cpu``: verify the kernels against the spec, then time them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from kimi_vllm.kernels.bench import cpu as cpu_bench
from kimi_vllm.kernels.bench.common import WrongResult, environment, report

app = typer.Typer(no_args_is_help=True, add_completion=False)


@app.callback()
def main() -> None:
    """Benchmarks of the KDA kernels."""


@app.command()
def cpu(
    json: Annotated[Path | None, typer.Option(help="Append one JSON line per row to this file.")] = None,
    dtype: Annotated[str, typer.Option(help="Activations: float32 or bfloat16.")] = "float32",
    threads: Annotated[int, typer.Option(help="Threads of torch; 0 leaves them as they are.")] = 0,
) -> None:
    """Time the CPU kernels against plain torch ops; refuses to time a kernel that is wrong."""
    activations = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype not in activations:
        raise typer.BadParameter(f"--dtype is {dtype}; it must be one of {', '.join(activations)}")
    if threads:
        torch.set_num_threads(threads)
    try:
        rows = list(cpu_bench.rows(activations[dtype]))
    except WrongResult as wrong:
        Console(stderr=True).print(f"[red]not timed:[/red] {wrong}")
        raise typer.Exit(1) from wrong
    report(rows, "torch", environment(), json)


app()
