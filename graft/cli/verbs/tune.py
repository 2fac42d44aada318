"""`graft tune`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graft.cli.console import verb
from graft.cli.options import Address, AsJson, DryRun, Home, Overrides, RecipePath

if TYPE_CHECKING:
    from rich.console import Console

    from graft.pipelines.tune import TunePlan, TuneResult
    from graft.report.finals_facts import Finals


def show(record: TuneResult | TunePlan, console: Console) -> None:
    """Prints the trials as a table and the best one below, or the plan."""
    from graft.pipelines.tune import TunePlan

    if isinstance(record, TunePlan):
        _show_plan(record, console)
        return
    from graft.cli.tables import trial_table

    metrics = ["train/loss", *record.searched]
    title = f"study {record.study}"
    console.print(trial_table(title, record.trials, metrics, record.best.number))
    paused = sum(trial.state == "paused" for trial in record.trials)
    console.print(
        f"ended by {record.ended_by}: {record.spending.words}"
        + (f"; paused trials: {paused}, --set {record.ended_by}=N goes on" if paused else "")
    )
    if record.finals is not None:
        _show_finals(record.finals, console)
    console.print(f"best: trial {record.best.number}, artifact {record.artifact[:12]}")
    for name, metric in record.metrics.items():
        interval = "" if metric.low is None else f"  [{metric.low:.4g}, {metric.high:.4g}]"
        console.print(f"  {name} {metric.value:.4g}{interval}  on {metric.rows} held-out rows")
    console.print(record.folder, soft_wrap=True)


def _show_finals(finals: Finals, console: Console) -> None:
    from rich.table import Table

    from graft.cli.tables import cell
    from graft.report.finals import interval_text, rerun_text

    table = Table(title="finalists on fresh seeds", box=None, header_style="bold")
    interval = f"{finals.confidence:.0%} interval"
    seeds = [f"seed {seed}" for seed in finals.seeds]
    for heading in ("trial", f"mean {finals.metric}", interval, *seeds):
        table.add_column(heading, justify="right")
    for place, finalist in enumerate(finals.finalists):
        published = finals.published_seed if place == 0 else None
        table.add_row(
            f"{'' if place else '*'}{finalist.number}",
            cell(finalist.mean),
            interval_text(finalist),
            *(rerun_text(rerun, published) for rerun in finalist.reruns),
            style=None if place else "bold",
        )
    console.print(table)
    console.print(f"{finals.verdict}; published: seed {finals.published_seed}", soft_wrap=True)


def _show_plan(plan: TunePlan, console: Console) -> None:
    console.print(f"study {plan.study} in {plan.folder}", soft_wrap=True)
    console.print(f"spent: {plan.spending.words}; left: {plan.spending.left}")
    if plan.num_reruns:
        console.print(f"then the best are trained again, {plan.num_reruns} times in all")
    for name, words in plan.holes.items():
        console.print(f"  {name}: {words}")


@verb(show)
def command(
    recipe: RecipePath,
    overrides: Overrides = None,
    home: Home = None,
    address: Address = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> TuneResult | TunePlan:
    """Search the recipe's open settings and publish the best trial's adapter.

    The same command goes on with a search that was interrupted; --set search.trials=N (max_hours,
    max_tokens) adds to one that is finished.
    """
    from graft.core.home import resolve_home
    from graft.pipelines.tune import plan_tune, tune
    from graft.recipe.load import load_recipe

    space = load_recipe(recipe, overrides or ())
    folder = resolve_home(home)
    if dry_run:
        return plan_tune(space, home=folder)
    from graft.cli.progress import terminal_progress

    return tune(space, home=folder, progress=terminal_progress(), address=address)
