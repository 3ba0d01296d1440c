"""The pictures of rows. Each carries the checksum of its rows: its bytes depend on matplotlib too."""

import hashlib
import tempfile
from pathlib import Path

from PIL import Image, PngImagePlugin

from docs.tables import ENGINE
from serve.bench.engine.plan import IN_TREE, OURS
from serve.bench.engine.rows import read

Pictures = dict[Path, tuple[Path, str]]

DRAWN: Pictures = {
    ENGINE / f"h200-{name}.png": (ENGINE / "h200.jsonl", f"{name}.png")
    for name in ("tpot", "tpot-amortised", "kda-mla", "concurrency")
}
DRAWN[ENGINE / "h200-drafts.png"] = ENGINE / "h200-drafts.jsonl", "drafts.png"
"""The pictures, their rows, and the names that `serve.bench.engine plot` gives them."""

_KEY = "Rows-SHA256"


def _checksum(rows: Path) -> str:
    return hashlib.sha256(rows.read_bytes()).hexdigest()


def stale() -> list[Path]:
    """Pictures that are missing or were drawn from other rows."""
    return [
        path
        for path, (rows, _) in DRAWN.items()
        if not path.exists() or Image.open(path).info.get(_KEY) != _checksum(rows)
    ]


def draw() -> None:
    """Draw all of them."""
    from serve.bench.engine.plots import plot

    for file in {rows for rows, _ in DRAWN.values()}:
        info = PngImagePlugin.PngInfo()
        info.add_text(_KEY, _checksum(file))
        with tempfile.TemporaryDirectory() as folder:
            plot([row for row in read(file) if row["provider"] in (OURS, IN_TREE)], Path(folder))
            for path, (rows, name) in DRAWN.items():
                if rows == file:
                    Image.open(Path(folder) / name).save(path, pnginfo=info, optimize=True)
