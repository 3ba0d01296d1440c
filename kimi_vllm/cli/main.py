"""The command `kimi-vllm`. Heavy modules are imported by the commands that need them, so --help is fast."""

import json
from dataclasses import asdict
from importlib.metadata import version
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kimi_vllm.cli.doctor import Finding, diagnose
from kimi_vllm.cli.inspect_state import inspect_state
from kimi_vllm.cli.plan import plan
from kimi_vllm.cli.sessions import app as sessions

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="vLLM plugin that serves Kimi Linear models with recurrent state and paged KV cache in one "
    "memory. To serve, run `vllm serve MODEL` as usual; vLLM loads the plugin. These commands check an installation, "
    "size a deployment, inspect a checkpoint and manage saved sessions.",
)

app.command()(plan)
app.command()(inspect_state)
app.add_typer(sessions, name="sessions")

_STYLES = {"OK": "green", "WARN": "yellow", "FAIL": "bold red"}


@app.callback(invoke_without_command=True)
def _root(show_version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    if show_version:
        print(f"kimi-vllm {version('kimi-vllm')}")
        raise typer.Exit


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Check whether vLLM on this machine would serve Kimi Linear with kimi-vllm, and how to fix what is wrong.

    Exit status: 0 if it would, 1 if any check is FAIL.
    """
    if as_json:
        findings = list(diagnose())
    else:
        with Console(stderr=True).status("Checking; importing vLLM takes a few seconds"):
            findings = list(diagnose())
    active = all(finding.status != "FAIL" for finding in findings)
    if as_json:
        print(json.dumps({"active": active, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        _print_table(findings, active=active)
    if not active:
        raise typer.Exit(1)


def _print_table(findings: list[Finding], *, active: bool) -> None:
    console = Console()
    table = Table("check", "status", "found", "how to fix")
    for finding in findings:
        status = f"[{_STYLES[finding.status]}]{finding.status}"
        table.add_row(finding.check, status, escape(finding.found), escape(finding.fix))
    console.print(table)
    verdict = (
        "[green]kimi-vllm is active:[/] `vllm serve` will use it for Kimi Linear."
        if active
        else "[bold red]kimi-vllm is not active[/] on this machine; see the rows marked FAIL."
    )
    console.print(verdict)


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="kimi-vllm")
