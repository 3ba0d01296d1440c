"""The commands `kimi-vllm sessions list`, `show` and `delete`: what is in a folder of sessions."""

import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from kimi_vllm.cache.session_folder import Session, SessionError, check_name, is_prefix_name, sessions

app = typer.Typer(no_args_is_help=True, help="List, show and delete the sessions that a server has saved.")


def _folder(path: Path) -> Path:
    if not path.is_dir():  # nor a device, which no option of typer's excludes
        raise typer.BadParameter(f"{path} is not a folder.")
    return path


Folder = Annotated[
    Path,
    typer.Option(
        "--dir",
        exists=True,
        file_okay=False,
        callback=_folder,
        help="The server's kimi.session_dir.",
        show_default=False,
    ),
]
Name = Annotated[str, typer.Argument(help="Name of the session.", show_default=False)]
Tenant = Annotated[
    str,
    typer.Option(help="Of sessions saved with a cache_salt: its digest as `list` shows it, or the beginning of that."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]

_WIDE = 240
"""Columns where nobody sees the output."""
_SHOWN = 8
"""Hexadecimal digits of a tenant in a table."""


@app.command("list")
def list_(folder: Folder, as_json: AsJson = False) -> None:
    """List sessions in the order in which `kimi.session_gib` deletes them: prefixes, then names, each by last use."""
    found = [_described(session) for session in sessions(folder)]
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    name = Column(
        "name", min_width=max([4, *(len(one["name"]) for one in found)])
    )  # `show` and `delete` need all of it
    table = Table(name, "tenant", "tokens", "MiB", "ranks", "last used", "state")
    for one in found:
        tokens = "?" if one["tokens"] is None else f"{one['tokens']:,}"
        size = f"{one['bytes'] / 2**20:,.1f}"
        table.add_row(
            one["name"], one["tenant"][:_SHOWN], tokens, size, str(one["ranks"]), one["used"], escape(one["state"])
        )
    Console(width=None if sys.stdout.isatty() else _WIDE).print(table)


@app.command()
def show(name: Name, folder: Folder, tenant: Tenant = "", as_json: AsJson = False) -> None:
    """Show a session's tokens, files and fingerprint.

    Exit status: 1 if there is no such session.
    """
    found = [_described(session, in_full=True) for session in _named(folder, name, tenant)]
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    for one in found:
        fingerprint, files = one.pop("fingerprint"), "\n".join(one.pop("files"))
        table = Table("", escape(one.pop("name")))
        for key, value in (one | {"files": files} | fingerprint).items():
            if value is not None:  # as the tokens of a broken file
                table.add_row(key, escape(str(value)))
        Console().print(table)


@app.command()
def delete(name: Name, folder: Folder, tenant: Tenant = "") -> None:
    """Delete a session, for all ranks. A request that is loading it right now is not disturbed.

    Exit status: 1 if there is no such session.
    """
    for session in _named(folder, name, tenant):
        session.delete()
        typer.echo(f"Deleted {session.name}: {len(session.files)} file(s), {session.size:,} bytes.")


def _named(folder: Path, name: str, tenant: str) -> list[Session]:
    """The sessions of a name and one tenant, of engines of any number of ranks."""
    try:
        if not is_prefix_name(name):
            check_name(name)
        named = [session for session in sessions(folder) if session.name == name]
        found = [one for one in named if (one.tenant.startswith(tenant) if tenant else not one.tenant)]
        if len({session.tenant for session in found}) > 1:
            raise SessionError("several tenants begin so: give more digits of --tenant.")
        if not found:
            others = sorted({session.tenant[:_SHOWN] for session in named if session.tenant})
            raise SessionError(f"there is no such session.{f' Of --tenant {others} there is.' if others else ''}")
    except SessionError as error:
        Console(stderr=True).print(f"[bold red]Session {escape(name)}:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from error
    return found


def _described(session: Session, *, in_full: bool = False) -> dict[str, Any]:
    from kimi_vllm.cache.session_files import read_header

    tokens, fingerprint, state = None, dict[str, str](), "whole"
    try:
        headers = [read_header(session.files[rank]) for rank in sorted(session.files)]
        tokens, fingerprint = headers[0].num_tokens, headers[0].fingerprint
        if not session.whole:
            missing = [str(rank) for rank in range(session.ranks) if rank not in session.files]
            state = f"lacks rank {', '.join(missing)}"
        elif len({header.checksums["tokens"] for header in headers}) > 1:
            state = "its ranks have saved different tokens"
    except SessionError as error:
        state = str(error)
    return {
        "name": session.name,
        "tenant": session.tenant,
        "tokens": tokens,
        "bytes": session.size,
        "ranks": session.ranks,
        "used": datetime.fromtimestamp(session.used).astimezone().isoformat(" ", "seconds"),
        "state": state,
    } | ({"files": [str(path) for path in session.files.values()], "fingerprint": fingerprint} if in_full else {})
