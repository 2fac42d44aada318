"""Drives the units of a comparison, one at a time, and keeps each one's record.

A method's folder holds the journal of its search and one `seed-<n>-<digest>.json` a final training;
`base-<quantization>.json` beside those folders is the bare base. Each record is written once,
whole, when its unit has ended; whatever is there is not done again.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from graft.core.errors import (
    AdapterError,
    ConfigError,
    DataError,
    GraftError,
    MissingDependencyError,
    ModelError,
    TrainingError,
)
from graft.core.files import write_atomic
from graft.core.model import StrictModel
from graft.core.progress import Progress, Task
from graft.pipelines.compare_contestants import Contestant, final_recipes
from graft.pipelines.compare_process import RunUnit, UnitCrashError
from graft.pipelines.compare_rows import done_row
from graft.pipelines.compare_unit import UnitSpec
from graft.report.comparison_facts import BaseFacts, MethodFacts, PointFacts, SeedFacts
from graft.runtime.trials import StudyFacts, TrialRecord, trial_digest

if TYPE_CHECKING:
    from graft.recipe.sections import Recipe
    from graft.runtime.study import Study
    from graft.runtime.trials import Asked

T = TypeVar("T", bound=StrictModel)

_REFUSALS = (AdapterError, ConfigError, ModelError, MissingDependencyError)


class Race:
    """All methods' units under one recipe."""

    def __init__(
        self,
        folder: Path,
        *,
        home: Path,
        steps: int,
        run_unit: RunUnit,
        progress: Progress,
        task: Task,
    ) -> None:
        """Starts nothing.

        Args:
            folder: Of the comparison.
            home: Where models are.
            steps: Of a final training.
            run_unit: How a unit is run.
            progress: Told what each unit does.
            task: Told of each unit's training steps when it has ended.
        """
        self.bases: dict[str, BaseFacts] = {}
        """Bare bases measured so far, by quantization."""
        self._folder = folder
        self._home = home
        self._steps = steps
        self._run_unit = run_unit
        self._progress = progress
        self._task = task

    def row(self, contestant: Contestant, facts: StudyFacts) -> MethodFacts:
        """Searches and trains one method; a refusal or an error becomes its row."""
        try:
            if contestant.space is None:
                raise ConfigError(str(contestant.reason))
            return self._compete(contestant, facts)
        except _REFUSALS as error:
            state, reason = "refused", str(error)
        except GraftError as error:
            state, reason = "failed", str(error)
        self._progress.note(f"{contestant.name} {state}: {reason}")
        return MethodFacts.model_validate(
            {
                "name": contestant.name,
                "method": contestant.method,
                "quantization": contestant.quantization,
                "state": state,
                "reason": reason,
            }
        )

    def _compete(self, contestant: Contestant, facts: StudyFacts) -> MethodFacts:
        from graft.runtime.study import open_study

        assert contestant.space is not None  # refused ones do not get here
        folder = method_folder(self._folder, contestant)
        search = contestant.space.sections().search
        base = self._base(contestant, contestant.space.example())
        with open_study(folder, search, facts, progress=self._progress) as study:
            study.enqueue([contestant.start()])
            self._search(contestant, study)
            best = study.best()
            points = [_point(trial) for trial in study.trials if trial.has_ended]
        finals = final_recipes(contestant, best.params, self._steps)
        seeds = [self._final(contestant, recipe) for recipe in finals]
        method = finals[0].method
        return done_row(
            contestant,
            points,
            _point(best),
            seeds,
            base,
            mergeable=method.merges,
            servable=sorted(method.servable),
        )

    def _search(self, contestant: Contestant, study: Study) -> None:
        """Runs the points that are left, those that an interruption cut short first."""
        assert contestant.space is not None
        left = study.unfinished(contestant.space)
        while left or sum(t.uses_budget for t in study.trials) < contestant.num_points:
            asked = left.pop(0) if left else study.ask(contestant.space)
            if asked is None:
                return  # every point of a grid has been tried
            self._try_point(contestant, study, asked)

    def _try_point(self, contestant: Contestant, study: Study, asked: Asked) -> None:
        self._progress.note(f"{contestant.name}: point {asked.number + 1}, {asked.params}")
        try:
            found = self._run("point", contestant, asked.recipe, PointFacts, str(asked.number))
        except UnitCrashError:
            raise
        except (TrainingError, ConfigError, DataError) as error:
            # Too high a learning rate is a result, too; so is too large a rank for this base.
            is_first = not any(trial.has_ended for trial in study.trials)
            if is_first and not isinstance(error, TrainingError):
                raise  # it is the method's own defaults: the method is refused
            study.tell(asked.number, "failed", reason=str(error))
        else:
            study.report(asked.number, found.steps, found.metrics)
            study.note(asked.number, seconds=found.seconds)
            study.tell(asked.number, "complete")
        self._task.advance(asked.recipe.train.steps, method=contestant.name)

    def _final(self, contestant: Contestant, recipe: Recipe) -> SeedFacts:
        seed, path = recipe.train.seed, _final_path(self._folder, contestant, recipe)
        if (known := _read(path, SeedFacts)) is not None:
            return known
        self._progress.note(f"{contestant.name}: final training, seed {seed}")
        found = self._run("seed", contestant, recipe, SeedFacts, f"seed-{seed}")
        write_atomic(path, found.model_dump_json())
        self._task.advance(recipe.train.steps, method=contestant.name)
        return found

    def _base(self, contestant: Contestant, recipe: Recipe) -> BaseFacts:
        name = contestant.quantization
        path = self._folder / f"base-{name}.json"
        known = self.bases.get(name) or _read(path, BaseFacts)
        if known is None:
            self._progress.note(f"the bare base, quantization {name}")
            known = self._run("base", contestant, recipe, BaseFacts, f"base-{name}")
            write_atomic(path, known.model_dump_json())
        self.bases[name] = known
        return known

    def _run(
        self, kind: str, contestant: Contestant, recipe: Recipe, result: type[T], log: str
    ) -> T:
        spec = UnitSpec.model_validate(
            {"kind": kind, "recipe": recipe.model_dump(mode="json"), "home": str(self._home)}
        )
        path = method_folder(self._folder, contestant) / "logs" / f"{log}.log"
        return result.model_validate_json(self._run_unit(spec, path, self._progress))


def method_folder(folder: Path, contestant: Contestant) -> Path:
    """Where a method's records are in a comparison's folder."""
    return folder / "methods" / contestant.name


def points_done(folder: Path, contestant: Contestant) -> int:
    """Points of a method's search that have ended."""
    study = _study(folder, contestant)
    return 0 if study is None else sum(trial.has_ended for trial in study.trials)


def steps_done(folder: Path, contestant: Contestant, steps: int) -> int:
    """Training steps of a method's row that are done already; trainings of an earlier best are not.

    Args:
        folder: Of the comparison.
        contestant: Whose records.
        steps: Of a final training.
    """
    study = _study(folder, contestant)
    if study is None or contestant.space is None:
        return 0
    ended = min(sum(trial.has_ended for trial in study.trials), contestant.num_points)
    try:
        finals = final_recipes(contestant, study.best().params, steps)
    except (TrainingError, ConfigError, KeyError):  # no best, or one of another recipe
        finals = []
    trained = sum(_final_path(folder, contestant, recipe).exists() for recipe in finals)
    return ended * contestant.space.sections().compare.search_steps + trained * steps


def _study(folder: Path, contestant: Contestant) -> Study | None:
    from graft.runtime.storage import is_begun
    from graft.runtime.study import read_study

    own = method_folder(folder, contestant)
    if contestant.space is None or not is_begun(own):
        return None
    return read_study(own, contestant.space.sections().search)


def _final_path(folder: Path, contestant: Contestant, recipe: Recipe) -> Path:
    name = f"seed-{recipe.train.seed}-{trial_digest(recipe)[:12]}.json"
    return method_folder(folder, contestant) / name


def _read(path: Path, result: type[T]) -> T | None:
    """Reads a record; None where there is none."""
    return result.model_validate_json(path.read_text()) if path.exists() else None


def _point(trial: TrialRecord) -> PointFacts:
    return PointFacts(
        params=trial.params,
        state="complete" if trial.state == "complete" else "failed",
        reason=trial.reason,
        metrics=trial.metrics,
        steps=trial.steps,
        seconds=trial.seconds,
    )
