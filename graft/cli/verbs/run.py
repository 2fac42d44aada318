"""`graft run`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graft.cli.console import verb
from graft.cli.options import Address, AsJson, Home, Overrides, RecipePath

if TYPE_CHECKING:
    from rich.console import Console

    from graft.pipelines.run import RunResult


def show(record: RunResult, console: Console) -> None:
    """Prints what was found, what it became and where to look."""
    made = record.tune.artifact if record.compress is None else record.compress.digest
    console.print(f"{record.name} version {record.version} is champion: {record.digest[:12]}")
    if made != record.digest:
        console.print(
            f"  it was promoted since; what follows is of {made[:12]}, which `graft adapters "
            f"promote {record.name} N` makes the champion again"
        )
    metrics = record.tune.metrics if record.compress is None else record.compress.metrics
    for name, metric in metrics.items():
        interval = "" if metric.low is None else f"  [{metric.low:.4g}, {metric.high:.4g}]"
        console.print(f"  {name} {metric.value:.4g}{interval}  on {metric.rows} held-out rows")
    if record.compress is not None:
        console.print(
            f"  compressed to {record.compress.num_bytes / 1e6:.2f} MB, "
            f"{record.compress.bytes_fraction:.3f} of its bf16 size; parity holds"
        )
    console.print(f"report: {record.report}", soft_wrap=True)


@verb(show)
def command(
    recipe: RecipePath,
    overrides: Overrides = None,
    home: Home = None,
    address: Address = None,
    as_json: AsJson = False,
) -> RunResult:
    """Go all the way: check the data, search, compress, prove, publish, promote, report.

    The same command goes on where it was interrupted; serve the result with `graft serve RECIPE`.
    """
    from graft.cli.progress import terminal_progress
    from graft.core.home import resolve_home
    from graft.pipelines.run import run
    from graft.recipe.load import load_recipe

    return run(
        load_recipe(recipe, overrides or ()),
        home=resolve_home(home),
        progress=terminal_progress(),
        address=address,
    )
