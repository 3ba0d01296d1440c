"""The command `kimi-vllm inspect-state`: its options. `inspection.py` computes, `inspection_report.py` shows."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape


def inspect_state(
    model: Annotated[Path, typer.Argument(help="Folder with config.json and safetensors; nothing is downloaded.")],
    prompt: Annotated[str | None, typer.Option(help="Text to run the model on.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Token ids to run it on instead: 1,2,3.")] = None,
    every: Annotated[
        int | None, typer.Option(min=1, help="Sample every N-th token. Default: about 32 samples.")
    ] = None,
    all_heads: Annotated[bool, typer.Option("--heads", help="One row per head instead of per layer.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Also draw this file (.png, .svg, .pdf); needs matplotlib.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the tokenizer run the checkpoint's Python code.")
    ] = False,
) -> None:
    """Show how much each KDA head remembers of a prompt, how fast it forgets, and whether its state can grow.

    Runs the model with transformers on the CPU: the WHOLE MODEL must fit into memory. Needs no vLLM and no server. Give
    --prompt or --tokens.

    Exit status: 0 if all states are finite and no sampled step can grow one, 1 if not, 2 if the model cannot run.
    """
    if (prompt is None) == (tokens is None):
        raise typer.BadParameter("give one of --prompt and --tokens.")
    # Read at import; transformers warns that its CPU kernels are slow.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from kimi_vllm.cli import inspection, inspection_report

    try:
        if plot is not None:
            inspection_report.check_plot(plot)
        if prompt is None:
            ids = inspection.parse_tokens(tokens or "")
        else:
            ids = inspection.tokenize(model, prompt, trust_remote_code=trust_remote_code)
        found = inspection.inspect_state(model, ids, every)
    except inspection.InspectionError as error:
        Console(stderr=True).print(f"[bold red]Error:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(2) from error
    if as_json:
        typer.echo(inspection_report.to_json(found))
    else:
        Console().print(
            inspection_report.table(found, all_heads=all_heads), *inspection_report.summary(found), sep="\n"
        )
    if plot is not None:
        inspection_report.plot(found, plot)
    if not found.sound:
        raise typer.Exit(1)
