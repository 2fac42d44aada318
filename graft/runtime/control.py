"""What a person may do to a study: end a trial or the search, let a trial go on, propose a copy."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from graft.core.errors import ConfigError
from graft.core.registry import nearest
from graft.engine.checkpoint import newest_step
from graft.engine.run_folder import CHECKPOINTS
from graft.recipe.holes import contains, middle
from graft.recipe.space import describe_space
from graft.runtime.requests import StudyAnswer, StudyRequest
from graft.runtime.trials import STOPPED_BY_PERSON, TrialRecord

if TYPE_CHECKING:
    from graft.core.spaces import Space
    from graft.recipe.space import RecipeSpace
    from graft.runtime.study import Study

_BRANCH = re.compile(r"\[[^]]*\]")


def require_possible(study: Study, space: RecipeSpace, request: StudyRequest) -> None:
    """Checks a request against what the study holds now.

    Raises:
        ConfigError: There is no such trial, its state does not allow it, its checkpoint is gone, or
            a clone's values cannot be.
    """
    if request.trial is None:
        return
    trial = _trial(study, request.trial)
    if request.action == "stop" and trial.state != "running":
        raise ConfigError(
            f"{_name(study, trial)} is {trial.state}; only a running one can be stopped: "
            f"{_numbers(study, 'running')}"
        )
    if request.action == "resume":
        _require_resumable(study, trial)
    if request.action == "clone":
        _clone_point(study, space, trial, request.values)


def apply(study: Study, space: RecipeSpace, request: StudyRequest) -> StudyAnswer:
    """Does what is asked of a study none of whose trials is being run.

    Raises:
        ConfigError: It is not possible; see `require_possible`.
    """
    require_possible(study, space, request)
    if request.trial is None:
        raise ConfigError(
            f"study {study.folder.name!r} is not being run; there is no search to end"
        )
    trial = study.trial(request.trial)
    if request.action == "stop":
        study.tell(trial.number, "stopped", reason=STOPPED_BY_PERSON)
        return stopped(study, trial.number)
    if request.action == "resume":
        step = _kept_step(study, trial.number)
        number = study.resume(trial.number)
        words = f"trial {trial.number} goes on from step {step} as trial {number}"
        return StudyAnswer(words=words, trial=number)
    point = _clone_point(study, space, trial, request.values)
    study.enqueue([point], again=True)
    return _proposed(study, point)


def stopped(study: Study, number: int) -> StudyAnswer:
    """Says that a trial was stopped, and what is left of it."""
    step, name = _kept_step(study, number), study.folder.name
    rest = (
        f"its checkpoint of step {step} is kept: `graft study resume {name} {number}` goes on"
        if step
        else "it has no checkpoint yet"
    )
    return StudyAnswer(words=f"trial {number} is stopped; {rest}", trial=number)


def _trial(study: Study, number: int) -> TrialRecord:
    trials = {trial.number: trial for trial in study.trials}
    if number not in trials:
        has = f"it has trials {min(trials)} to {max(trials)}" if trials else "it has none yet"
        raise ConfigError(f"study {study.folder.name!r} has no trial {number}; {has}")
    return trials[number]


def _name(study: Study, trial: TrialRecord) -> str:
    return f"trial {trial.number} of study {study.folder.name!r}"


def _numbers(study: Study, state: str) -> str:
    found = [str(trial.number) for trial in study.trials if trial.state == state]
    return f"trial {', '.join(found)}" if found else f"there is no {state} one"


def _kept_step(study: Study, number: int) -> int:
    return newest_step(study.trial_folder(number) / CHECKPOINTS)


def _require_resumable(study: Study, trial: TrialRecord) -> None:
    name, clone = _name(study, trial), f"graft study clone {study.folder.name} {trial.number}"
    if trial.continued_by is not None:
        raise ConfigError(f"{name} went on as trial {trial.continued_by}; ask for that one")
    if trial.state in ("running", "waiting"):
        raise ConfigError(f"{name} is {trial.state}; there is nothing to take up again")
    if trial.state == "paused":
        raise ConfigError(
            f"{name} is paused: {trial.reason}, without being asked: `graft tune` with that budget "
            "set higher"
        )
    if trial.state == "complete":
        raise ConfigError(
            f"{name} is complete: it has done all of its {trial.steps} steps; `{clone} --set "
            "PATH=VALUE` proposes its settings with another value"
        )
    if not _kept_step(study, trial.number):
        why = (
            "the scheduler stopped it, and such trials keep none"
            if trial.state == "stopped" and not trial.may_go_on
            else "it has none"
        )
        raise ConfigError(
            f"{name} has no checkpoint to go on from: {why}. What can be done: `{clone}` proposes "
            "its settings again, from the first step"
        )


def _clone_point(
    study: Study, space: RecipeSpace, trial: TrialRecord, values: dict[str, Any]
) -> dict[str, Any]:
    """Returns a trial's settings with some changed; what they newly open is for the sampler.

    Raises:
        ConfigError: A setting is not open, or its value or the combination is not allowed.
    """
    known = {name: value for name, value in trial.params.items() if name in space.holes}
    given: dict[str, Any] = {}
    for path, value in values.items():
        given |= dict.fromkeys(_holes(space, path), value)
    asked: dict[str, Any] = {}
    sampled = []

    def choose(name: str, hole: Space) -> Any:
        if name not in given and not (name in known and contains(hole, known[name])):
            sampled.append(name)
            return middle(hole)
        asked[name] = given[name] if name in given else known[name]
        if not contains(hole, asked[name]):
            raise ConfigError(f"{name}: {asked[name]!r} is not in {describe_space(hole)}")
        return asked[name]

    space.sample(choose)
    for path in values:
        if not set(_holes(space, path)) & asked.keys():
            opens = " and ".join(
                f"{name} is {label}"
                for name, label in space.opened_by(_holes(space, path)[0]).items()
            )
            raise ConfigError(f"{path} is open only where {opens}; set that too, or leave it out")
    if study.section.sampler == "grid" and not sampled:
        same = [t.number for t in study.trials if t.params == asked]
        if same:
            raise ConfigError(
                f"search.sampler grid tries each point once, and trial {same[0]} is this one"
            )
    return asked


def _holes(space: RecipeSpace, path: str) -> list[str]:
    """Returns the parameters that a path names, of whatever branch."""
    wanted = path.replace(".", "/")
    exact = [name for name in space.holes if name in (path, wanted)]
    found = exact or [name for name in space.holes if _BRANCH.sub("", name) == wanted]
    if not found:
        raise ConfigError(
            f"{path} is not an open setting of the study.{nearest(wanted, list(space.holes))} "
            f"Open: {', '.join(space.holes)}"
        )
    return found


def _proposed(study: Study, point: dict[str, Any]) -> StudyAnswer:
    number = study.trials[-1].number
    values = ", ".join(f"{name} {value}" for name, value in point.items())
    before = sum(trial.state == "waiting" for trial in study.trials) - 1
    words = f"trial {number} is proposed with {values}"
    words += f", after {before} that wait already" if before else ""
    if study.num_remaining <= before:
        words += (
            f". The budget of {study.section.trials} trials is used: `graft tune RECIPE --set "
            f"search.trials={study.section.trials + before + 1 - study.num_remaining}` runs it"
        )
    return StudyAnswer(words=words, trial=number)
