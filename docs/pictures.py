"""The pictures of the H200's rows. Each carries the checksum of its rows: its bytes depend on matplotlib too."""

import hashlib
import tempfile
from pathlib import Path

from PIL import Image, PngImagePlugin

from docs.tables import ENGINE
from serve.bench.engine.plan import IN_TREE, OURS
from serve.bench.engine.rows import read

ROWS = ENGINE / "h200.jsonl"
DRAWN = {ENGINE / f"h200-{name}.png": f"{name}.png" for name in ("tpot", "tpot-amortised", "kda-mla", "concurrency")}
"""The pictures, and the names that `serve.bench.engine plot` gives them."""

_KEY = "Rows-SHA256"


def _checksum() -> str:
    return hashlib.sha256(ROWS.read_bytes()).hexdigest()


def stale() -> list[Path]:
    """Pictures that are missing or were drawn from other rows."""
    return [path for path in DRAWN if not path.exists() or Image.open(path).info.get(_KEY) != _checksum()]


def draw() -> None:
    """Draw all of them."""
    from serve.bench.engine.plots import plot

    info = PngImagePlugin.PngInfo()
    info.add_text(_KEY, _checksum())
    with tempfile.TemporaryDirectory() as folder:
        plot([row for row in read(ROWS) if row["provider"] in (OURS, IN_TREE)], Path(folder))
        for path, name in DRAWN.items():
            Image.open(Path(folder) / name).save(path, pnginfo=info, optimize=True)
