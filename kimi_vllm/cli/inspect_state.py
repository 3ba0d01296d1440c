"""The command `kimi-vllm inspect-state`: its options. `inspection.py` does the work, imported only when it runs."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape


def inspect_state(
    model: Annotated[Path, typer.Argument(help="Folder with config.json and safetensors. Nothing is downloaded.")],
    prompt: Annotated[str | None, typer.Option(help="Text to run the model on.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Token ids to run it on instead: 1,2,3.")] = None,
    every: Annotated[
        int | None,
        typer.Option(min=1, help="Look at every so many-th token; 1: at all. By default at about 32 of them."),
    ] = None,
    all_heads: Annotated[bool, typer.Option("--heads", help="A row for each head, not for each layer.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Also draw a picture into this file, such as state.png.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the tokenizer run Python code of the checkpoint's.")
    ] = False,
) -> None:
    """Show what each KDA head remembers of a prompt, how fast it forgets, and whether its state can grow.

    Runs the model with transformers on the CPU: the WHOLE MODEL must fit in memory, so take a small model or a big
    machine. Needs no vLLM and no running server. Give --prompt or --tokens.

    Exit status: 0 if all states are finite and no checked step can grow one, 1 if not, 2 if the model cannot be run.
    """
    if (prompt is None) == (tokens is None):
        raise typer.BadParameter("give one of --prompt and --tokens.")
    # Read when it is imported; it warns that its CPU kernels are not the fastest.
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
