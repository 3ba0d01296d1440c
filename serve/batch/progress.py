"""What a batch shows while it runs: a bar with tokens/s and the time left, or a line from time to time in a log."""

import time
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LOG_SECONDS = 15


class BatchProgress:
    """The bar.

    Attributes:
        answered: lines answered in this run.
        failed: lines that failed in it.
        output_tokens: Tokens that the server generated for them.
        prompt_tokens: Tokens that it read.
    """

    def __init__(self, console: Console, total: int, completed: int) -> None:
        self.answered = self.failed = self.output_tokens = self.prompt_tokens = 0
        self._console = console
        columns = (
            TaskProgressColumn(),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[failed]} failed"),
            TextColumn("[progress.data.speed]{task.fields[rate]:,.0f} tok/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console, speed_estimate_period=30)
        # A hidden task without a total: rich keeps its speed as it does for the bar.
        self._tokens = self._bar.add_task("", total=None, visible=False)
        self._lines = self._bar.add_task("", total=total, completed=completed, failed=0, rate=0.0)
        self._started = self._logged = time.monotonic()

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *reason: object) -> None:
        """Leave its last state on the screen."""
        self._bar.stop()

    @property
    def seconds(self) -> float:
        """Since the start of this run."""
        return time.monotonic() - self._started

    @property
    def tokens_per_second(self) -> float:
        """Output tokens per second, lately."""
        return next(task for task in self._bar.tasks if task.id == self._tokens).speed or 0.0

    def advance(self, answered: int, failed: int, prompt_tokens: int, output_tokens: int) -> None:
        """Count lines that are on the disk."""
        self.answered += answered
        self.failed += failed
        self.prompt_tokens += prompt_tokens
        self.output_tokens += output_tokens
        self._bar.update(self._tokens, advance=output_tokens)
        self._bar.update(self._lines, advance=answered + failed, failed=self.failed, rate=self.tokens_per_second)
        if not self._console.is_terminal and time.monotonic() - self._logged > LOG_SECONDS:
            self._logged = time.monotonic()
            task = next(task for task in self._bar.tasks if task.id == self._lines)
            left = f"{task.time_remaining:,.0f} s left" if task.time_remaining is not None else "time left unknown"
            self._console.print(
                f"{task.completed:,.0f} of {task.total:,.0f} lines, {self.failed:,} failed, "
                f"{self.tokens_per_second:,.0f} tok/s, {left}"
            )
