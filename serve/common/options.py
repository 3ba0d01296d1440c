"""What the tools' command lines share."""

from collections.abc import Iterable

import typer


def refuse_unknown(option: str, asked: Iterable[str], known: Iterable[str]) -> None:
    """End with a usage error if a repeatable option has a value that there is not.

    Raises:
        BadParameter: names the value, and those that there are.
    """
    if unknown := sorted(set(asked) - set(known)):
        raise typer.BadParameter(f"{option} is {unknown[0]}; it must be one of {', '.join(known)}")
