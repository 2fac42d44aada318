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

    from graft.recipe.costs import unit_of
    from graft.report.words import metric_words

    names = list(dict.fromkeys(name for trial in trials for name in trial.params))
    shown = list(dict.fromkeys(metrics))
    table = Table(title=title, box=None, header_style="bold")
    for heading in ("trial", "state", "steps", "tokens", *names, *shown, "seconds"):
        table.add_column(heading, justify="right", overflow="fold")
    for trial in trials:
        is_best = trial.number == best
        table.add_row(
            f"{'*' if is_best else ''}{trial.number}",
            trial.state,
            str(trial.steps),
            f"{trial.tokens:,}",
            *(cell(trial.params.get(name)) for name in names),
            *(
                metric_words(trial.metrics[name], unit_of(name)) if name in trial.metrics else ""
                for name in shown
            ),
            f"{trial.seconds:.1f}",
            style="bold" if is_best else None,
        )
    return table


def cell(value: object) -> str:
    """Writes a value with four digits that count; nothing for what is not known."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
