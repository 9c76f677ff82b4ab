"""How far an evaluation is: a bar on a terminal, and lines that say how long it still takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

QUIET_SECONDS = 30.0
"""The longest time without a line."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """Rows that are scored together.

    Attributes:
        name: what is measured on them.
        rows: the number of rows.
        cost: the cost of one row, in any unit that all sections share.
    """

    name: str
    rows: int
    cost: float


class RowProgress:
    """Prints how far the rows are scored; a context manager around the scoring.

    It is made when the scoring begins, from which it measures the time.

    Args:
        sections: all sections, in the order in which they are scored.
        console: where to print.
        quiet: print nothing (on all ranks but the first).
        clock: the time in seconds.
    """

    def __init__(
        self,
        sections: Sequence[Section],
        console: Console,
        *,
        quiet: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console, self._quiet, self._clock = console, quiet, clock
        self._left = list(sections)
        self._total = sum(section.rows * section.cost for section in sections)
        self._before = 0.0  # the cost of the finished sections
        self._began = self._last_line = self._section_began = clock()
        columns = TextColumn("{task.description}"), BarColumn(bar_width=None), TaskProgressColumn()
        hidden = quiet or not console.is_terminal
        more = TimeElapsedColumn()
        self._bar = Progress(
            *columns, more, console=console, expand=True, transient=True, disable=hidden
        )
        self._task = self._bar.add_task("", total=self._total)

    def __enter__(self) -> RowProgress:
        rows = sum(section.rows for section in self._left)
        self._say(f"scores     {_rows(rows)}; data and model are loaded")
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def rows_done(self, rows: int) -> None:
        """Tells that this many rows of the current section are scored."""
        section, now = self._left[0], self._clock()
        state = f"{section.name}: row {rows:,} of {section.rows:,}"
        left = self._update(rows * section.cost, state)
        if rows and now - self._last_line >= QUIET_SECONDS:
            self._say(f"{state}, {left}")

    def section_done(self) -> None:
        """Tells that the current section is complete; the next one begins."""
        section, now = self._left.pop(0), self._clock()
        seconds, self._section_began = now - self._section_began, now
        left = self._update(section.rows * section.cost, section.name)
        self._before += section.rows * section.cost
        self._say(f"{section.name}: {_rows(section.rows)} in {duration(seconds)}, {left}")

    def _update(self, cost: float, state: str) -> str:
        """Moves the bar; returns how much is done and how long the rest takes."""
        done = self._before + cost
        if not done:
            self._bar.update(self._task, description=state)
            return ""
        seconds = (self._clock() - self._began) * (self._total - done) / done
        left = f"{done / self._total:.0%} done, about {duration(seconds)} left"
        if done >= self._total:
            left = "all done"
        self._bar.update(self._task, completed=done, description=f"{state}, {left}")
        return left

    def _say(self, text: str) -> None:
        self._last_line = self._clock()
        if not self._quiet:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def _rows(number: int) -> str:
    return f"{number:,} row{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """A time in words, to the second or to the minute."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
