"""Progress that people see, on stderr: bars on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from graft.cli.console import make_console
from graft.core.progress import LiveTable, Progress, Task

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import rich.progress
    from rich.console import Console, RenderableType
    from rich.table import Table

SECONDS_BETWEEN_LINES = 15.0


def terminal_progress() -> Progress:
    """Returns bars where stderr is a terminal, plain lines where it is not."""
    if sys.stderr.isatty():
        return BarProgress(make_console(stderr=True))
    return LineProgress(make_console(stderr=True))


def format_fields(fields: dict[str, float | str]) -> str:
    """Joins fields as `loss 0.4123  tokens/s 214`."""
    return "  ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in fields.items()
    )


def format_done(done: float, total: float | None, unit: str) -> str:
    """Formats `3/8 step`, or `3 step` where the end is unknown."""
    return f"{done:g} {unit}" if total is None else f"{done:g}/{total:g} {unit}"


def format_duration(seconds: float) -> str:
    """Formats seconds as `1:05:09`, `5:09` or `0:09`.

    >>> format_duration(3909)
    '1:05:09'
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class BarProgress(Progress):
    """Bars with fields and the time left; the display lives as long as any task is open."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: rich.progress.Progress | None = None
        self._tables: list[_BarTable] = []
        self._num_open = 0

    def task(self, label: str, total: float | None = None, unit: str = "step") -> Task:
        """Opens a bar."""
        bars = self._open()
        done = format_done(0, total, unit)
        bar = bars.add_task(label, total=total, done=done, fields="")
        return _BarTask(self, bars, bar, unit)

    def table(self, title: str) -> LiveTable:
        """Opens a table above the bars."""
        self._open()
        table = _BarTable(self, title)
        self._tables.append(table)
        return table

    def _open(self) -> rich.progress.Progress:
        if self._bars is None:
            self._tables = []
            self._bars = _make_bars(self._console, self._tables)
            self._bars.start()
        self._num_open += 1
        return self._bars

    def note(self, text: str) -> None:
        """Prints one line above the bars."""
        self._console.print(text, soft_wrap=True, markup=False)

    def task_closed(self) -> None:
        """Called once by each task that closes; the last one ends the display."""
        self._num_open -= 1
        if self._num_open == 0 and self._bars is not None:
            self._bars.stop()
            self._bars = None


def _make_bars(console: Console, tables: Sequence[_BarTable]) -> rich.progress.Progress:
    from rich import progress

    class Bars(progress.Progress):
        """Bars with the tables above them."""

        def get_renderables(self) -> Iterator[RenderableType]:
            """Yields what is drawn again and again."""
            for table in tables:
                yield table.draw()
            yield self.make_tasks_table(self.tasks)

    return Bars(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(bar_width=24),
        progress.TextColumn("{task.fields[done]}", markup=False),
        progress.TextColumn("{task.fields[fields]}", style="cyan", markup=False),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(elapsed_when_finished=False),
        console=console,
    )


class _BarTask(Task):
    def __init__(
        self, owner: BarProgress, bars: rich.progress.Progress, bar: rich.progress.TaskID, unit: str
    ) -> None:
        self._owner = owner
        self._bars = bars
        self._bar = bar
        self._unit = unit
        self._fields: dict[str, float | str] = {}
        self._is_open = True

    def advance(self, amount: float = 1, **fields: float | str) -> None:
        self._fields.update(fields)
        task = self._bars.tasks[self._bars.task_ids.index(self._bar)]
        self._bars.update(
            self._bar,
            advance=amount,
            done=format_done(task.completed + amount, task.total, self._unit),
            fields=format_fields(self._fields),
        )

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            self._bars.stop_task(self._bar)
            self._owner.task_closed()


class _BarTable(LiveTable):
    def __init__(self, owner: BarProgress, title: str) -> None:
        self._owner = owner
        self._title = title
        self._shown: tuple[Sequence[str], Sequence[Sequence[str]], int | None] = ((), (), None)
        self._is_open = True

    def update(
        self, headings: Sequence[str], rows: Sequence[Sequence[str]], marked: int | None = None
    ) -> None:
        self._shown = (headings, rows, marked)

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            self._owner.task_closed()

    def draw(self) -> Table:
        """Draws the rows of the last update."""
        from rich.table import Table
        from rich.text import Text

        headings, rows, marked = self._shown
        table = Table(title=self._title, box=None, header_style="bold")
        for heading in headings:
            table.add_column(Text(heading), justify="right", no_wrap=True)
        for index, row in enumerate(rows):
            table.add_row(*map(Text, row), style="bold" if index == marked else None)
        return table


class LineProgress(Progress):
    """One line at the start, one every quarter of a minute, one at the end."""

    def __init__(self, console: Console, *, interval_s: float = SECONDS_BETWEEN_LINES) -> None:
        self._console = console
        self._interval_s = interval_s

    def task(self, label: str, total: float | None = None, unit: str = "step") -> Task:
        """Begins a task that writes lines."""
        return _LineTask(self, label, total, unit, self._interval_s)

    def note(self, text: str) -> None:
        """Writes one line."""
        self._console.print(text, soft_wrap=True, markup=False)


class _LineTask(Task):
    def __init__(
        self, owner: LineProgress, label: str, total: float | None, unit: str, interval_s: float
    ) -> None:
        self._owner = owner
        self._label = label
        self._total = total
        self._unit = unit
        self._interval_s = interval_s
        self._done = 0.0
        self._fields: dict[str, float | str] = {}
        self._began = self._last = time.monotonic()
        self._first: tuple[float, float] | None = None
        """When this process told for the first time, and what was done by then: some of it may be
        an earlier one's."""
        self._is_open = True

    def advance(self, amount: float = 1, **fields: float | str) -> None:
        self._done += amount
        self._first = self._first or (time.monotonic(), self._done)
        self._fields.update(fields)
        now = time.monotonic()
        if now - self._last >= self._interval_s:
            self._last = now
            self._write(left_s=self._left_s(now))

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            self._write(left_s=None)

    def _left_s(self, now: float) -> float | None:
        began, before = self._first or (now, self._done)
        if not self._total or self._done <= before:
            return None
        return max(self._total - self._done, 0.0) * (now - began) / (self._done - before)

    def _write(self, *, left_s: float | None) -> None:
        done = format_done(self._done, self._total, self._unit)
        parts = [f"{self._label}: {done}", format_fields(self._fields)]
        elapsed = format_duration(time.monotonic() - self._began)
        parts.append(f"{elapsed} elapsed")
        if left_s is not None:
            parts.append(f"{format_duration(left_s)} left")
        self._owner.note("  ".join(part for part in parts if part))
