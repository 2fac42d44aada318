"""The trials of a running search as a table that changes in place, where a person looks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from graft.core.progress import LiveTable, Progress

if TYPE_CHECKING:
    from graft.runtime.study import Study
    from graft.runtime.trials import TrialRecord

MAX_ROWS = 20

_BRANCH = re.compile(r"\[[^]]*\]")
_SPEED = "train/tokens_per_s"


class TrialTable:
    """Draws a study's trials; without a screen it does nothing, and bars or lines tell the same."""

    def __init__(self, study: Study, progress: Progress) -> None:
        self._study = study
        self._progress = progress
        self._table: LiveTable | None = None

    def open(self) -> bool:
        """Begins to draw; tells whether somebody sees it."""
        self._table = self._progress.table(f"study {self._study.folder.name}")
        self.redraw()
        return self._table is not None

    def redraw(self) -> None:
        """Draws what the study holds now."""
        if self._table is None:
            return
        records = self._study.records
        metrics = [objective.metric for objective in self._study.section.objectives]
        best = self._study.best() if records.front else None
        first = records.unfinished + ([] if best is None else [best])
        shown = choose_rows(first, reversed(records))
        self._table.update(*table_of(shown, metrics, None if best is None else best.number))

    def close(self) -> None:
        """Leaves the last state on the screen."""
        if self._table is not None:
            self._table.close()
            self._table = None


def choose_rows(
    first: Iterable[TrialRecord], newest_first: Iterable[TrialRecord]
) -> list[TrialRecord]:
    """Returns some trials and those that came last, in order, together at most `MAX_ROWS`.

    Those to come first are shown whatever their number.
    """
    shown = {trial.number: trial for trial in first}
    for trial in newest_first:
        if len(shown) >= MAX_ROWS:
            break
        if trial.uses_budget:
            shown[trial.number] = trial
    return [shown[number] for number in sorted(shown)]


def table_of(
    shown: Sequence[TrialRecord], metrics: Sequence[str], best: int | None
) -> tuple[list[str], list[list[str]], int | None]:
    """Returns headings, rows and the position of the best trial's row."""
    names = list(dict.fromkeys(_bare(name) for trial in shown for name in trial.params))
    headings = ["trial", "state", "steps", *_short(names), *metrics, "tokens/s"]
    rows = [_row(trial, names, metrics, is_best=trial.number == best) for trial in shown]
    marked = next((i for i, trial in enumerate(shown) if trial.number == best), None)
    return headings, rows, marked


def _row(
    trial: TrialRecord, names: Sequence[str], metrics: Sequence[str], *, is_best: bool
) -> list[str]:
    values = {_bare(name): value for name, value in trial.params.items()}
    return [
        f"*{trial.number}" if is_best else str(trial.number),
        trial.state,
        str(trial.steps),
        *(_cell(values.get(name)) for name in names),
        *(_cell(trial.metrics.get(name)) for name in metrics),
        f"{trial.metrics[_SPEED]:.0f}" if _SPEED in trial.metrics else "",
    ]


def _bare(name: str) -> str:
    """Names a setting whatever branch it is of."""
    return _BRANCH.sub("", name)


def _short(names: Sequence[str]) -> list[str]:
    """Leaves out the sections of names that are as clear without them."""
    ends = [name.split("/")[-1] for name in names]
    return [end if ends.count(end) == 1 else name for name, end in zip(names, ends, strict=True)]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
