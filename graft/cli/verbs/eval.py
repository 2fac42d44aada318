"""`graft eval`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graft.cli.console import verb
from graft.cli.options import AsJson, Home, OptionalRecipe, Overrides
from graft.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from graft.pipelines.evaluate import EvalResult
    from graft.recipe.sections import Recipe

Target = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE|ADAPTER|base",
        help="A recipe (its name's champion), an adapter, or 'base' for the bare base of --recipe.",
        show_default=False,
    ),
]


def show(record: EvalResult, console: Console) -> None:
    """Prints each metric with its interval."""
    console.print(f"{record.subject[:12]} on {record.data}", soft_wrap=True)
    for name, metric in record.metrics.items():
        interval = "" if metric.low is None else f"  [{metric.low:.4g}, {metric.high:.4g}]"
        console.print(f"  {name} {metric.value:.4g}{interval}  {metric.rows} rows")


@verb(show)
def command(
    target: Target,
    recipe: OptionalRecipe = None,
    overrides: Overrides = None,
    home: Home = None,
    as_json: AsJson = False,
) -> EvalResult:
    """Measure an adapter, or the bare base, on held-out rows, with intervals."""
    from graft.cli.progress import terminal_progress
    from graft.core.home import resolve_home
    from graft.pipelines.evaluate import evaluate_reference

    folder = resolve_home(home)
    reference, wanted = _find(target, recipe, overrides or [], folder)
    return evaluate_reference(reference, wanted, home=folder, progress=terminal_progress())


def _find(
    target: str, path: Path | None, overrides: list[str], home: Path
) -> tuple[str, Recipe | None]:
    from graft.pipelines.evaluate import BASE
    from graft.pipelines.forms import recipe_for
    from graft.recipe.load import load_recipe

    if Path(target).suffix in (".yaml", ".yml"):
        if path is not None:
            raise ConfigError(
                f"{target} is a recipe itself, and --recipe names {path}: give one of them"
            )
        space = load_recipe(Path(target), overrides)
        return space.sections().name, space.example()
    if target == BASE:
        return BASE, None if path is None else load_recipe(path, overrides).example()
    if path is not None:
        return target, load_recipe(path, overrides).example()
    return target, recipe_for(target, None, overrides, home=home)
