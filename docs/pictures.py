"""The pictures that the documents show of the H200's rows, drawn anew when the rows have changed.

A picture carries the checksum of the rows it was drawn from, so that a stale one can be told without drawing it: the
bytes of a picture depend on the version of matplotlib too.
"""

import hashlib
import tempfile
from pathlib import Path

from PIL import Image, PngImagePlugin

from docs.regions import ENGINE
from serve.bench.engine.plan import IN_TREE, OURS
from serve.bench.engine.rows import read

ROWS = ENGINE / "h200.jsonl"
DRAWN = {ENGINE / f"h200-{name}.png": f"{name}.png" for name in ("tpot", "tpot-amortised", "kda-mla")}
"""The pictures, and what `python -m serve.bench.engine plot` calls them."""

_KEY = "Rows-SHA256"


def checksum() -> str:
    """Of the rows as they are now."""
    return hashlib.sha256(ROWS.read_bytes()).hexdigest()


def stale() -> list[Path]:
    """Pictures of other rows, or of none that are known."""
    now = checksum()
    return [path for path in DRAWN if not path.exists() or _source(path) != now]


def draw() -> None:
    """Draw all of them."""
    from serve.bench.engine.plots import plot

    rows = [row for row in read(ROWS) if row["provider"] in (OURS, IN_TREE)]
    info = PngImagePlugin.PngInfo()
    info.add_text(_KEY, checksum())
    with tempfile.TemporaryDirectory() as folder:
        plot(rows, Path(folder))
        for path, name in DRAWN.items():
            with Image.open(Path(folder) / name) as picture:
                picture.save(path, pnginfo=info, optimize=True)


def _source(path: Path) -> str | None:
    with Image.open(path) as picture:
        found: str | None = picture.info.get(_KEY)
    return found
