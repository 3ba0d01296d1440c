"""Tables of results, for the terminal and as Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class ResultTable:
    """A title, column names, and cells as text."""

    title: str
    columns: Sequence[str]
    cells: Sequence[Sequence[str]]
    words: int = 1  # how many columns, from the left, are words; the others are numbers

    def markdown(self) -> str:
        """Return the table as Markdown."""
        rule = ["---"] * self.words + ["---:"] * (len(self.columns) - self.words)
        return "\n".join([f"**{self.title}**", "", *map(_line, (self.columns, rule, *self.cells))])

    def show(self) -> None:
        """Print it, at least 120 columns wide: a table that is cut says nothing."""
        table = Table(title=self.title, title_justify="left")
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="left" if index < self.words else "right")
        for cells in self.cells:
            table.add_row(*cells)
        console = Console(highlight=False)
        console.width = max(console.width, 120)
        console.print(table)


def tokens(count: int) -> str:
    """4096 as 4K, 1048576 as 1M."""
    for size, unit in ((1 << 20, "M"), (1 << 10, "K")):
        if count >= size and count % size == 0:
            return f"{count // size}{unit}"
    return f"{count:,}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/').replace(chr(10), ' ') for cell in cells)} |"
