"""``python -m kimi_vllm.kernels.bench`` with cpu, cuda, windows or products: verify the kernels, then time them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from json import loads
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from kimi_vllm.kernels.bench import cpu as cpu_bench
from kimi_vllm.kernels.bench.common import Row, WrongResult, append, environment, report

app = typer.Typer(no_args_is_help=True, add_completion=False)


@app.callback()
def main() -> None:
    """Benchmarks of the KDA kernels, and of the products of a few rows beside them."""


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
    _take(cpu_bench.rows(activations[dtype]), environment(), partial(report, peer="torch"), json)


@app.command()
def cuda(
    heads: Annotated[list[int], typer.Option(help="Heads of a layer; repeat for several.")] = [32, 16, 8, 4],  # noqa: B006
    states: Annotated[list[str], typer.Option(help="State of the decode step: fp32, bf16, fp16.")] = ["fp32", "bf16"],  # noqa: B006
    peers: Annotated[
        bool, typer.Option(help="Time vLLM's layer and fla beside ours, where they are installed.")
    ] = True,
    json: Annotated[Path | None, typer.Option(help="Append one JSON line per row to this file.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Draw plots into this folder.")] = None,
) -> None:
    """Time the CUDA kernels; refuses to time a kernel, ours or a peer's, that is wrong."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("no CUDA device here; `cpu` times the CPU kernels")
    from kimi_vllm.kernels.bench import cuda as cuda_bench
    from kimi_vllm.kernels.bench import gpu

    if unknown := sorted(set(states) - set(cuda_bench.DTYPES)):
        raise typer.BadParameter(f"--states is {unknown[0]}; it must be one of {', '.join(cuda_bench.DTYPES)}")
    for name, reason in cuda_bench.missing_peers().items() if peers else ():
        Console(stderr=True).print(f"[yellow]{name} is not timed:[/yellow] {reason}")

    def found() -> Iterator[Row]:
        for H in heads:
            for state in states:
                yield from cuda_bench.decode_rows(H, 128, state, peers)
            # One number of heads says how the peers' prefill compares; they tune themselves for minutes.
            yield from cuda_bench.prefill_rows(H, 128, peers and max(heads) == H)

    env = gpu.environment()
    rows = _take(found(), env, cuda_bench.report, json)
    if plots is not None:
        _plot([loads(row.as_json(env)) for row in rows], plots)


@app.command()
def windows(
    heads: Annotated[list[int], typer.Option(help="Heads of a layer; repeat for several.")] = [32],  # noqa: B006
    drafts: Annotated[list[int], typer.Option(help="Drafts of a window; repeat for several.")] = [3, 5],  # noqa: B006
    states: Annotated[list[str], typer.Option(help="State: fp32, bf16, fp16.")] = ["fp32", "bf16"],  # noqa: B006
    batches: Annotated[list[int], typer.Option(help="Sequences; repeat for several.")] = [1, 8, 64, 256],  # noqa: B006
    search: Annotated[bool, typer.Option(help="Try many launch parameters instead of the table's.")] = False,
    json: Annotated[Path | None, typer.Option(help="Append one JSON line per row to this file.")] = None,
) -> None:
    """Time windows of drafts against decode steps of one token, and against vLLM's layer where it is installed."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("no CUDA device here; these kernels are for CUDA only")
    from kimi_vllm.kernels.bench import cuda as cuda_bench
    from kimi_vllm.kernels.bench import gpu
    from kimi_vllm.kernels.bench import windows as bench

    if unknown := sorted(set(states) - set(cuda_bench.DTYPES)):
        raise typer.BadParameter(f"--states is {unknown[0]}; it must be one of {', '.join(cuda_bench.DTYPES)}")
    missing = cuda_bench.missing_peers()
    found = (
        row
        for H in heads
        for count in drafts
        for state in states
        for row in bench.window_rows(H, 128, count, state, batches, cuda_bench.IN_TREE not in missing, search)
    )
    _take(found, gpu.environment(), bench.report, json)


@app.command()
def products(
    tokens: Annotated[list[int], typer.Option(help="Rows of the activations; repeat for several.")] = [1, 2, 4, 8],  # noqa: B006
    search: Annotated[bool, typer.Option(help="Try many launch parameters instead of the table's.")] = False,
    linear: Annotated[bool, typer.Option(help="Time linear layers.")] = True,
    experts: Annotated[bool, typer.Option(help="Time experts; needs vLLM.")] = True,
    inner: Annotated[list[int], typer.Option(help="Inner channels of an expert; repeat for several.")] = [1024],  # noqa: B006
    fp8: Annotated[bool, typer.Option(help="FP8 weights, beside vLLM's products; needs vLLM.")] = False,
    json: Annotated[Path | None, typer.Option(help="Append one JSON line per row to this file.")] = None,
) -> None:
    """Time products of a few rows against cuBLAS, and experts of a few tokens against vLLM's, at the 48B shapes."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("no CUDA device here; these kernels are for CUDA only")
    from kimi_vllm.kernels.bench import gpu
    from kimi_vllm.kernels.bench import products as bench

    found = chain(
        bench.linear_rows(tuple(tokens), search, fp8) if linear else (),
        bench.routing_rows(tuple(tokens)) if experts else (),
        bench.expert_rows(tuple(tokens), search, tuple(inner), fp8) if experts else (),
    )
    _take(found, gpu.environment(), bench.report, json)


@app.command("plot")
def plot_file(
    json: Annotated[Path, typer.Argument(help="JSON lines of the `cuda` command.")],
    folder: Annotated[Path, typer.Argument(help="Draw plots into this folder.")],
) -> None:
    """Draw the plots of a file that `cuda --json` has written."""
    _plot([loads(line) for line in json.read_text().splitlines()], folder)


def _take(
    found: Iterable[Row], env: dict[str, Any], report: Callable[[list[Row], dict[str, Any]], None], json: Path | None
) -> list[Row]:
    """Write each row as it is found, and show them all: also those before a result that is wrong, which ends it."""
    rows: list[Row] = []
    try:
        with torch.inference_mode():
            for row in found:
                rows.append(row)
                if json is not None:
                    append(row, env, json)
    except WrongResult as wrong:
        Console(stderr=True).print(f"[red]not timed:[/red] {wrong}")
        raise typer.Exit(1) from wrong
    finally:
        report(rows, env)
    return rows


def _plot(rows: list[dict[str, Any]], folder: Path) -> None:
    from kimi_vllm.kernels.bench.plots import plot

    folder.mkdir(parents=True, exist_ok=True)
    plot(rows, folder)


app()
