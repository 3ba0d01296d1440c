"""What every generated table shares: where results are, and how cells look."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENGINE = ROOT / "serve" / "bench" / "results"
KERNELS = ROOT / "kernels" / "bench" / "results"
NONE = "–"
MIB = 2**20


def table(columns: Sequence[str], cells: Iterable[Sequence[str]], left: int | None = 1) -> str:
    """A Markdown table; columns after the first `left` hold numbers and are right-aligned, with None no column is."""
    left = len(columns) if left is None else left
    rule = ["---"] * left + ["---:"] * (len(columns) - left)
    return "\n".join(f"| {' | '.join(line)} |" for line in (columns, rule, *cells))


def pair(ours: float | None, theirs: float | None, digits: int = 0, *, more_is_better: bool = False) -> str:
    """Two numbers in one cell, the better one in bold if both are known."""
    if ours is theirs is None:
        return NONE
    shown = [NONE if value is None else f"{value:,.{digits}f}" for value in (ours, theirs)]
    if ours is not None and theirs is not None and ours != theirs:
        better = int((theirs > ours) == more_is_better)
        shown[better] = f"**{shown[better]}**"
    return " / ".join(shown)


def micros(us: float) -> str:
    """Three digits, in the unit that fits."""
    number, unit = (us, "µs") if us < 500 else (us / 1000, "ms")
    return f"{number:.{max(0, 2 - int(math.log10(number)))}f} {unit}"
