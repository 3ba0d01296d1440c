"""Write the generated parts of README.md and docs/*.md anew with cog, and redraw pictures whose rows changed.

    python -m docs
    python -m docs --check

A page calls a function of this package between ``[[[cog`` and ``[[[end]]]``. ``--check`` writes nothing and exits with
a status other than 0 if a part or a picture is stale.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer
from cogapp import Cog

from docs import pictures

ROOT = Path(__file__).parents[1]


def pages() -> list[Path]:
    """The pages that may have generated parts."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def cog(*options: str, paths: list[Path]) -> int:
    """Run cog over pages; its exit status, which is 5 where ``--check`` finds a stale part."""
    prologue = "from docs import proof, reference, results"
    return int(Cog().main(["cog", "-P", "-p", prologue, "--verbosity=1", *options, *map(str, paths)]))


Check = Annotated[bool, typer.Option("--check", help="Write nothing; fail if a part is stale.")]


def main(check: Check = False) -> None:
    """Write the generated parts and draw the pictures, or check them."""
    stale = pictures.stale()
    if stale and not check:
        pictures.draw()
    for path in stale:
        typer.echo(f"{path.relative_to(ROOT)}: {'stale; run make docs' if check else 'drawn'}")
    status = cog(*(("--check", "--diff", "--check-fail-msg=run make docs") if check else ("-r",)), paths=pages())
    sys.exit(status or int(check and bool(stale)))


if __name__ == "__main__":
    typer.run(main)
