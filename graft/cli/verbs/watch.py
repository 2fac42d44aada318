"""`graft watch`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from graft.cli.console import verb
from graft.cli.options import AsJson, Home, Overrides, RecipePath

if TYPE_CHECKING:
    from rich.console import Console

    from graft.runtime.loopstate import LoopStatus

Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        envvar="RAY_ADDRESS",
        help="Head of the Ray cluster that serves, host:port; without it the journal is only read.",
        show_default=False,
    ),
]
Once = Annotated[bool, typer.Option("--once", help="Print where it stands, and end.")]


def show(status: LoopStatus, console: Console) -> None:
    """Prints where a loop stands."""
    paused = ", paused" if status.is_paused else ""
    running = "no monitor at work" if status.is_stopped else f"monitor {status.incarnation}"
    console.print(f"{status.name}: {status.state}{paused} ({running})")
    console.print(
        f"  {status.num_prompts} prompts, {status.num_tests} tests, {status.num_alarms} alarms, "
        f"{status.num_renewals} renewals, {status.num_refused} observations refused"
    )
    if (verdict := status.last_verdict) is not None:
        p_value = "" if verdict["p_value"] is None else f", p = {verdict['p_value']:.3g}"
        console.print(
            f"  last test: {verdict['detector']} at prompt {verdict['num_prompts']}: statistic "
            f"{verdict['statistic']:.4g}, threshold {verdict['threshold']:.4g}{p_value}"
        )
    for reason in (status.evidence or {}).get("reasons") or ():
        console.print(f"  {reason}")


@verb(show)
def command(
    recipe: RecipePath,
    overrides: Overrides = None,
    home: Home = None,
    address: Address = None,
    once: Once = False,
    as_json: AsJson = False,
) -> LoopStatus:
    """Watch the served prompts for drift from the training prompts; alarms start nothing.

    With --address the monitor is started on that cluster, where it stays, and each test is told as
    it comes. Without, or with --once or --json, where the watch stands is read from its journal.
    """
    from graft.cli.progress import terminal_progress
    from graft.core.home import resolve_home
    from graft.pipelines.watch import follow, watch
    from graft.recipe.load import load_recipe
    from graft.runtime.loopstate import read_status
    from graft.runtime.session import ray_session

    space = load_recipe(recipe, overrides or ())
    folder, name = resolve_home(home), space.sections().name
    progress = terminal_progress()
    if address is not None and not (once or as_json):
        with ray_session(address):
            watch(space, home=folder, progress=progress)
            follow(folder, name, progress)
    return read_status(folder, name)
