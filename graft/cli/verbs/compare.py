"""`graft compare`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from graft.cli.console import verb
from graft.cli.options import AsJson, DryRun, Home, Overrides, RecipePath
from graft.core.errors import TrainingError

if TYPE_CHECKING:
    from rich.console import Console

    from graft.pipelines.compare import ComparePlan
    from graft.report import Comparison

Methods = Annotated[
    str,
    typer.Option(
        "--methods",
        metavar="A,B|all",
        help="Registered methods and compare.variants of the recipe, by name.",
    ),
]
Budget = Annotated[
    int | None,
    typer.Option(
        "--budget",
        metavar="N",
        min=1,
        help="Searched points a method; default: search.trials.",
        show_default=False,
    ),
]


def show(record: Comparison | ComparePlan, console: Console) -> None:
    """Prints one row a method, or the plan."""
    from graft.pipelines.compare import PAGE_FILE, ComparePlan

    if isinstance(record, ComparePlan):
        _show_plan(record, console)
        return
    from rich.table import Table

    from graft.report.comparison import explanation
    from graft.report.comparison_table import columns

    shown = columns(record)
    table = Table(title=f"comparison {record.name}", box=None, header_style="bold")
    for column in shown:
        table.add_column(column.heading, justify="right" if column.is_number else "left")
    for row in record.methods:
        is_best = row.name in record.front
        cells = [column.text(row) for column in shown]
        table.add_row(*cells, style="bold" if is_best else None)
    console.print(table)
    console.print(explanation(record))
    console.print(f"{record.folder}/{PAGE_FILE}", soft_wrap=True)


def _show_plan(plan: ComparePlan, console: Console) -> None:
    console.print(f"comparison {plan.name} in {plan.folder}", soft_wrap=True)
    console.print(
        f"{plan.budget} points of {plan.search_steps} steps a method, then {plan.num_seeds} seeds "
        f"of {plan.steps} steps; {plan.num_steps_done} of {plan.num_steps} steps are done"
    )
    for method in plan.methods:
        words = ", ".join(f"{name}: {space}" for name, space in method.searched.items())
        console.print(
            f"  {method.name}: " + (f"refused: {method.refused}" if method.refused else words)
        )


def broken(record: Comparison | ComparePlan) -> TrainingError | None:
    """Says which methods broke; refused ones are an answer."""
    from graft.pipelines.compare import ComparePlan

    if isinstance(record, ComparePlan):
        return None
    failed = [f"{row.name} ({row.reason})" for row in record.methods if row.state == "failed"]
    if not failed:
        return None
    return TrainingError(
        f"{len(failed)} of {len(record.methods)} methods broke: {'; '.join(failed)}; the same "
        "command tries them again"
    )


@verb(show, refusal=broken)
def command(
    recipe: RecipePath,
    methods: Methods = "all",
    budget: Budget = None,
    overrides: Overrides = None,
    home: Home = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> Comparison | ComparePlan:
    """Compare tuning methods: each searched alike in its own space, its best trained again.

    The same command goes on with a comparison that was interrupted. A method that cannot run is a
    row with the reason. Rows of methods that an earlier run named stay.
    """
    from graft.core.home import resolve_home
    from graft.pipelines.compare import compare, plan_compare
    from graft.recipe.load import load_recipe

    space = load_recipe(recipe, overrides or ())
    folder = resolve_home(home)
    names = [name.strip() for name in methods.split(",") if name.strip()]
    if dry_run:
        return plan_compare(space, home=folder, methods=names, budget=budget)
    from graft.cli.progress import terminal_progress

    return compare(space, home=folder, methods=names, budget=budget, progress=terminal_progress())
