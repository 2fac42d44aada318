"""`study`: look at searches, and act on one, whether a process drives it or not."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from graft.core.errors import ConfigError, GraftError
from graft.core.model import Listed, StrictModel
from graft.core.progress import QUIET, Progress
from graft.runtime.requests import StudyAnswer, StudyRequest
from graft.runtime.samplers import settled_search
from graft.runtime.trials import TrialRecord

if TYPE_CHECKING:
    from graft.recipe.space import RecipeSpace

ANSWERS_WITHIN_S = 30.0

_LOOK_EVERY_S = 0.25


class StudyLine(StrictModel):
    """One study."""

    name: str
    driver: str | None = None
    """Process that runs it now."""
    num_ended: int = 0
    num_running: int = 0
    trials: int = 0
    """Budget."""
    metric: str = ""
    """Searched first."""
    best: TrialRecord | None = None
    problem: str | None = None
    """Why it cannot be read; then all but the name is empty."""


class StudyList(StrictModel):
    """Every study of a home folder."""

    studies: Listed[StudyLine]


class StudyDetails(StrictModel):
    """One study and its trials."""

    name: str
    folder: str
    driver: str | None
    trials: Listed[TrialRecord]
    searched: Listed[str]
    """Metrics."""
    budget: int
    best: int | None
    """Trial."""
    resume_command: str
    """What goes on with the search."""


class StudyChange(StrictModel):
    """What became of a wish."""

    study: str
    is_done: bool
    """False where the process that runs the study has not answered in time; the wish stands."""
    words: str
    trial: int | None = None
    """Trial that was stopped, goes on or is proposed."""
    resume_command: str | None = None
    """What goes on with the search, where no process runs it afterwards."""


def list_studies(*, home: Path) -> StudyList:
    """Lists studies; one that cannot be read, with the reason."""
    lines = []
    for path in sorted((home / "studies").glob("*/recipe.yaml")):
        name = path.parent.name
        try:
            lines.append(_line(show_study(name, home=home)))
        except GraftError as error:
            lines.append(StudyLine(name=name, problem=str(error)))
    return StudyList(studies=tuple(lines))


def show_study(study: str, *, home: Path) -> StudyDetails:
    """Shows one study's trials, also while it runs.

    Args:
        study: Its name, or the path of its recipe.
        home: Where it is kept.

    Raises:
        ConfigError: There is no such study.
    """
    from graft.runtime.storage import driver_of
    from graft.runtime.study import read_study

    folder, space = _find(study, home)
    section = settled_search(space)
    record = read_study(folder, section)
    complete = record.front()
    return StudyDetails(
        name=folder.name,
        folder=str(folder),
        driver=driver_of(folder),
        trials=tuple(record.trials),
        searched=tuple(o.metric for o in section.objectives),
        budget=section.trials,
        best=record.best().number if complete else None,
        resume_command=_resume_command(folder, home),
    )


def stop(
    study: str, trial: int | None = None, *, home: Path, progress: Progress = QUIET
) -> StudyChange:
    """Ends one running trial, or the whole search; what is half-trained keeps its checkpoint.

    Args:
        study: Its name, or the path of its recipe.
        trial: None ends the search.
        home: Where the study is kept.
        progress: Told what is waited for.

    Raises:
        ConfigError: There is no such study or trial, or it is not running.
    """
    return _ask(study, StudyRequest(action="stop", trial=trial), home, progress)


def resume(study: str, trial: int, *, home: Path, progress: Progress = QUIET) -> StudyChange:
    """Lets a trial that was stopped or failed go on from its checkpoint, under a new number.

    Args:
        study: Its name, or the path of its recipe.
        trial: That has ended.
        home: Where the study is kept.
        progress: Told what is waited for.

    Raises:
        ConfigError: There is no such study or trial, or its checkpoint is gone.
    """
    return _ask(study, StudyRequest(action="resume", trial=trial), home, progress)


def clone(
    study: str,
    trial: int,
    changes: Sequence[str] = (),
    *,
    home: Path,
    progress: Progress = QUIET,
) -> StudyChange:
    """Proposes a trial's settings again, some of them with other values, as the next trial.

    Args:
        study: Its name, or the path of its recipe.
        trial: Whose settings.
        changes: `train.lr=0.001` each, a value that the open setting allows.
        home: Where the study is kept.
        progress: Told what is waited for.

    Raises:
        ConfigError: There is no such study or trial, or the values cannot be.
    """
    from graft.recipe.tree import read_value

    values = {}
    for change in changes:
        path, equals, text = change.partition("=")
        if not equals or not path.strip():
            raise ConfigError(f"--set {change}: expected PATH=VALUE, as in --set train.lr=0.001")
        values[path.strip()] = read_value(text, f"--set {change}")
    return _ask(study, StudyRequest(action="clone", trial=trial, values=values), home, progress)


def _ask(study: str, request: StudyRequest, home: Path, progress: Progress) -> StudyChange:
    """Has a request done: by the process that runs the study, or at once where there is none."""
    from graft.runtime.control import require_possible
    from graft.runtime.requests import leave_request, withdraw_request
    from graft.runtime.storage import driver_of
    from graft.runtime.study import read_study

    folder, space = _find(study, home)
    require_possible(read_study(folder, settled_search(space)), space, request)
    answer = _do_now(folder, space, request)
    if answer is None:
        path = leave_request(folder, request)
        progress.note(f"asked {driver_of(folder) or 'its driver'}, which runs the study")
        answer = _await_answer(folder, path)
        if answer is None and driver_of(folder) is None and withdraw_request(path):
            answer = _do_now(folder, space, request)
            if answer is None:
                raise ConfigError(
                    f"study {folder.name!r} is run by a process that {home} does not show, perhaps "
                    "from a copy of it; nothing was done. Ask again, or there"
                )
    if answer is not None and answer.is_refused:
        raise ConfigError(answer.words)
    ends_search = request.trial is None
    driver = None if ends_search else driver_of(folder)
    waits = f"{driver or 'the driver'} has not answered yet, and does it when it next looks"
    return StudyChange(
        study=folder.name,
        is_done=answer is not None,
        words=waits if answer is None else answer.words,
        trial=answer.trial if answer else None,
        resume_command=_resume_command(folder, home) if driver is None else None,
    )


def _do_now(folder: Path, space: RecipeSpace, request: StudyRequest) -> StudyAnswer | None:
    """Does what is asked where no process runs the study; None where one does."""
    from graft.runtime.control import apply
    from graft.runtime.study import edit_study

    with edit_study(folder, settled_search(space)) as record:
        return None if record is None else apply(record, space, request)


def _await_answer(folder: Path, path: Path) -> StudyAnswer | None:
    """Waits for the driver; None where it does not answer in time, or is gone."""
    from graft.runtime.requests import answer_of
    from graft.runtime.storage import driver_of

    deadline = time.monotonic() + ANSWERS_WITHIN_S
    while time.monotonic() < deadline:
        is_driven = driver_of(folder) is not None
        if (answer := answer_of(folder, path)) is not None or not is_driven:
            return answer
        time.sleep(_LOOK_EVERY_S)
    return None


def _find(study: str, home: Path) -> tuple[Path, RecipeSpace]:
    from graft.pipelines.report import known_studies, study_name
    from graft.recipe.load import load_recipe

    name = study_name(study)
    folder = home / "studies" / name
    if not (folder / "recipe.yaml").is_file():
        raise ConfigError(f"there is no study {name!r} in {home}; known: {known_studies(home)}")
    return folder, load_recipe(folder / "recipe.yaml")


def _resume_command(folder: Path, home: Path) -> str:
    return f"graft tune {folder / 'recipe.yaml'} --home {home}"


def _line(found: StudyDetails) -> StudyLine:
    return StudyLine(
        name=found.name,
        driver=found.driver,
        num_ended=sum(trial.has_ended for trial in found.trials),
        num_running=sum(trial.state == "running" for trial in found.trials),
        trials=found.budget,
        metric=found.searched[0],
        best=next((trial for trial in found.trials if trial.number == found.best), None),
    )
