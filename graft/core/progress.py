"""How long work tells a person where it stands, without knowing whether anybody looks."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType


class Task:
    """One piece of long work; a context manager. The base class is silent."""

    def advance(self, amount: float = 1, **fields: float | str) -> None:
        """Moves on by `amount` units; fields (loss, tokens/s) stand beside the bar."""

    def close(self) -> None:
        """Ends the task; harmless when repeated."""

    def __enter__(self) -> Task:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class LiveTable:
    """A table that changes in place. The base class is silent."""

    def update(
        self, headings: Sequence[str], rows: Sequence[Sequence[str]], marked: int | None = None
    ) -> None:
        """Shows other rows; the marked one stands out."""

    def close(self) -> None:
        """Leaves the table as it is; harmless when repeated."""


class Progress:
    """What pipelines report to; silent unless the command line passes one that draws."""

    def task(self, label: str, total: float | None = None, unit: str = "step") -> Task:
        """Begins a piece of work of `total` units, or of unknown length."""
        return Task()

    def table(self, title: str) -> LiveTable | None:
        """Opens a table; None where nothing changes in place, and tasks are to tell the same."""
        return None

    def note(self, text: str) -> None:
        """Says one line."""


QUIET = Progress()
