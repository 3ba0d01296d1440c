"""Write the generated parts of README.md and docs/*.md anew, and the pictures of results: `make docs`.

A part lies between ``<!-- generated: NAME -->`` and ``<!-- end -->``; NAME is a function of `regions.py`, which makes
its text from results of benchmarks, options or profiles. ``--check`` writes nothing and fails if a part is stale.
"""

import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from docs import (
    engine_regions,  # noqa: F401  registers its parts
    pictures,
    proof_regions,  # noqa: F401
)
from docs.regions import REGIONS

ROOT = Path(__file__).parents[1]
REGION = re.compile(r"^(<!-- generated: (?P<name>[\w-]+) -->\n)(?P<text>.*?)(?P<end>^<!-- end -->$)", re.M | re.S)
_MARKER = re.compile(r"<!-- (?:generated: [\w-]+|end) -->")


class RegionError(ValueError):
    """A marked part that nobody can write. Names the file."""


def documents() -> list[Path]:
    """The files that may have generated parts."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def renew(path: Path) -> str:
    """The text of a document with every generated part as it should be.

    Raises:
        RegionError: a part has a name that `regions.py` does not know, or its markers are not a pair.
    """
    text = path.read_text()
    found = list(REGION.finditer(text))
    if len(_MARKER.findall(text)) != 2 * len(found) or any(_MARKER.search(match["text"]) for match in found):
        raise RegionError(f"{path.name}: a marker of a generated part has no partner")
    for match in found:
        if match["name"] not in REGIONS:
            raise RegionError(f"{path.name}: {match['name']} is not one of {', '.join(REGIONS)}")
    return REGION.sub(lambda match: f"{match[1]}{REGIONS[match['name']]()}\n{match['end']}", text)


def stale(paths: Iterable[Path]) -> Iterator[tuple[Path, str]]:
    """The documents that `renew` would change, and their new texts."""
    for path in paths:
        text = renew(path)
        if text != path.read_text():
            yield path, text


def main(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit with 1 if a part is stale.")] = False,
) -> None:
    """Write the generated parts of README.md and docs/*.md, and draw the pictures of rows that have changed."""
    changed, drawn = dict(stale(documents())), pictures.stale()
    if not check:
        for path, text in changed.items():
            path.write_text(text)
        if drawn:
            pictures.draw()
    for path in (*changed, *drawn):
        typer.echo(f"{path.relative_to(ROOT)}: {'stale; run make docs' if check else 'written'}")
    raise typer.Exit(int(check and bool(changed or drawn)))


if __name__ == "__main__":
    sys.exit(typer.run(main))
