"""Tables of trials, as `graft tune` and `graft study` print them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from graft.runtime.trials import TrialRecord


def trial_table(
    title: str, trials: Sequence[TrialRecord], metrics: Sequence[str], best: int | None
) -> Table:
    """Draws a row a trial: state, steps, open settings and metrics; the best one is marked."""
    from rich.table import Table

    names = list(dict.fromkeys(name for trial in trials for name in trial.params))
    shown = list(dict.fromkeys(metrics))
    table = Table(title=title, box=None, header_style="bold")
    for heading in ("trial", "state", "steps", *names, *shown, "seconds"):
        table.add_column(heading, justify="right")
    for trial in trials:
        is_best = trial.number == best
        table.add_row(
            f"{'*' if is_best else ''}{trial.number}",
            trial.state,
            str(trial.steps),
            *(_cell(trial.params.get(name)) for name in names),
            *(_cell(trial.metrics.get(name)) for name in shown),
            f"{trial.seconds:.1f}",
            style="bold" if is_best else None,
        )
    return table


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
