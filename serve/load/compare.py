"""Two load tests side by side: each number of both and their ratio."""

from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from serve.load.record import Record, RecordError

# Whether more is better.
NUMBERS = {
    "output_throughput": ("output tok/s", True),
    "request_goodput": ("good requests/s", True),
    "p50_ttft_ms": ("TTFT p50, ms", False),
    "p99_ttft_ms": ("TTFT p99, ms", False),
    "p50_tpot_ms": ("TPOT p50, ms", False),
    "p99_tpot_ms": ("TPOT p99, ms", False),
    "p99_itl_ms": ("ITL p99, ms", False),
}
NOTICEABLE = 0.05  # smaller differences are not coloured


@dataclass(frozen=True, slots=True)
class Difference:
    """A number in both."""

    label: str
    name: str
    first: float
    second: float
    more_is_better: bool

    @property
    def ratio(self) -> float:
        """Second to first."""
        return self.second / self.first

    @property
    def style(self) -> str:
        """Green if the second is better by enough to notice, red if it is worse."""
        change = self.ratio - 1 if self.more_is_better else 1 - self.ratio
        return "green" if change > NOTICEABLE else "red" if change < -NOTICEABLE else ""


def differences(first: Record, second: Record) -> list[Difference]:
    """All numbers that both have.

    Raises:
        RecordError: they have no point in common.
    """
    others = {point.label: point for point in second.points if point.result}
    pairs = [(point, others[point.label]) for point in first.points if point.result and point.label in others]
    if not pairs:
        raise RecordError("the two load tests have no point in common")
    found = []
    for one, other in pairs:
        for key, (name, more_is_better) in NUMBERS.items():
            a, b = one.get(key), other.get(key)
            if a and b is not None:
                found.append(Difference(one.label, name, a, b, more_is_better))
    return found


def surroundings(first: Record, second: Record) -> list[tuple[str, str, str]]:
    """Versions and machines of both, by name; a dash where one does not say."""
    names = sorted(first.environment.keys() | second.environment.keys())
    return [(name, first.environment.get(name, "–"), second.environment.get(name, "–")) for name in names]


def table(first: Record, second: Record) -> Table:
    """Both, for a terminal; above it what differs between their surroundings."""
    changed = [f"{name}: {a} → {b}" for name, a, b in surroundings(first, second) if a != b]
    title = f"A: {first.title}, {first.started}   B: {second.title}, {second.started}"
    found = Table("point", "", title="\n".join([title, *changed]))
    for name in ("A", "B", "B / A"):
        found.add_column(name, justify="right")
    last = ""
    for row in differences(first, second):
        ratio = Text(f"{row.ratio:.2f}×", row.style)
        found.add_row(row.label if row.label != last else "", row.name, f"{row.first:.4g}", f"{row.second:.4g}", ratio)
        last = row.label
    return found
