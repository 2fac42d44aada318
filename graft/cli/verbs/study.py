"""`graft study`: list, show, stop, resume, clone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from graft.cli.console import verb
from graft.cli.options import AsJson, Home

if TYPE_CHECKING:
    from rich.console import Console

    from graft.pipelines.study import StudyChange, StudyDetails, StudyList

app = typer.Typer(
    help="List and show searches; stop, resume and clone their trials, also while they run.",
    no_args_is_help=True,
)

Name = Annotated[
    str, typer.Argument(metavar="NAME", help="The study, or its recipe.", show_default=False)
]
Trial = Annotated[
    int, typer.Argument(metavar="TRIAL", help="The trial's number.", show_default=False)
]
OneOrAll = Annotated[
    int | None,
    typer.Argument(
        metavar="TRIAL", help="One running trial; default: end the search.", show_default=False
    ),
]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PATH=VALUE",
        help="Another value of an open setting, as in --set train.lr=0.001; repeatable.",
        show_default=False,
    ),
]


def _show_list(found: StudyList, console: Console) -> None:
    if not found.studies:
        console.print("no studies yet; `graft tune` makes them")
    for line in found.studies:
        if line.problem is not None:
            console.print(f"{line.name}  {line.problem}", soft_wrap=True)
            continue
        at_work = f"run by {line.driver}" if line.driver else "not being run"
        told = f"{line.name}  {line.num_ended}/{line.trials} trials ended"
        told += f", {line.num_running} running" if line.num_running else ""
        if line.best is not None:
            told += f"  best: trial {line.best.number}, "
            told += f"{line.metric} {line.best.metrics[line.metric]:.4g}"
        console.print(f"{told}  {at_work}", soft_wrap=True)


@app.command("list")
@verb(_show_list)
def list_command(home: Home = None, as_json: AsJson = False) -> StudyList:
    """List searches, how far they are and who runs them."""
    from graft.core.home import resolve_home
    from graft.pipelines.study import list_studies

    return list_studies(home=resolve_home(home))


def _show_details(found: StudyDetails, console: Console) -> None:
    from graft.cli.tables import trial_table

    marked = found.best
    metrics = ["train/loss", *found.searched, "train/tokens_per_s"]
    console.print(trial_table(f"study {found.name}", found.trials, metrics, marked))
    for trial in found.trials:
        if trial.continued_by is not None:
            console.print(f"trial {trial.number} goes on as trial {trial.continued_by}")
        elif trial.reason is not None:
            console.print(f"trial {trial.number} {trial.state}: {trial.reason}", soft_wrap=True)
    if found.driver is not None:
        console.print(f"run by {found.driver}; `graft study stop {found.name}` ends it")
    else:
        console.print(f"not being run; {found.resume_command}", soft_wrap=True)


@app.command("show")
@verb(_show_details)
def show_command(study: Name, home: Home = None, as_json: AsJson = False) -> StudyDetails:
    """Show a search's trials, also while it runs."""
    from graft.core.home import resolve_home
    from graft.pipelines.study import show_study

    return show_study(study, home=resolve_home(home))


def _show_change(change: StudyChange, console: Console) -> None:
    console.print(change.words, soft_wrap=True)
    if change.resume_command is not None:
        console.print(f"to go on: {change.resume_command}", soft_wrap=True)


@app.command("stop")
@verb(_show_change)
def stop_command(
    study: Name, trial: OneOrAll = None, home: Home = None, as_json: AsJson = False
) -> StudyChange:
    """Stop one running trial, whose place another takes, or end the whole search in order.

    What was being trained keeps its checkpoint.
    """
    from graft.cli.progress import terminal_progress
    from graft.core.home import resolve_home
    from graft.pipelines.study import stop

    return stop(study, trial, home=resolve_home(home), progress=terminal_progress())


@app.command("resume")
@verb(_show_change)
def resume_command(
    study: Name, trial: Trial, home: Home = None, as_json: AsJson = False
) -> StudyChange:
    """Let a trial that was stopped or failed go on from its checkpoint, under a new number."""
    from graft.cli.progress import terminal_progress
    from graft.core.home import resolve_home
    from graft.pipelines.study import resume

    return resume(study, trial, home=resolve_home(home), progress=terminal_progress())


@app.command("clone")
@verb(_show_change)
def clone_command(
    study: Name,
    trial: Trial,
    changes: Changes = None,
    home: Home = None,
    as_json: AsJson = False,
) -> StudyChange:
    """Propose a trial's settings again, with other values where given, as the next trial."""
    from graft.cli.progress import terminal_progress
    from graft.core.home import resolve_home
    from graft.pipelines.study import clone

    return clone(study, trial, changes or (), home=resolve_home(home), progress=terminal_progress())
