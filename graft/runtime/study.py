"""The study of record: an Optuna study in a journal file or a database.

What has been proposed, tried and measured is there and nowhere else; a search that died is
continued from it. One process at a time may drive a study; any number may read it,
`optuna-dashboard` among them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft.core.errors import ConfigError, TrainingError
from graft.core.progress import QUIET, Progress
from graft.core.spaces import Float, Int, Space
from graft.runtime.postgres import PATIENCE_S, StudyTakenError
from graft.runtime.samplers import endless_grid, seeded_sampler
from graft.runtime.storage import Kept, storage_to_drive, storage_to_read, while_running
from graft.runtime.study_events import TrialEvents
from graft.runtime.trial_records import TrialRecords
from graft.runtime.trials import (
    CONTINUES,
    EARLIER,
    Asked,
    Earlier,
    Outcome,
    Sampled,
    StudyFacts,
    Suggest,
    TrialRecord,
    Winner,
    move_folder,
    trial_digest,
)

if TYPE_CHECKING:
    import optuna

    from graft.recipe.search import SearchSection
    from graft.recipe.sections import Recipe

_MAX_INFEASIBLE_IN_A_ROW = 100


class Study:
    """One study of record. Made by `open_study`; used by one thread of one process.

    Args:
        folder: Of the study.
        kept: The same in its storage.
        study: The same in Optuna's hands.
        section: How it searches.
        drives: Whether this process writes to it, and no other one does.
    """

    def __init__(
        self, folder: Path, kept: Kept, study: optuna.Study, section: SearchSection, *, drives: bool
    ) -> None:
        self.folder = folder
        self.section = section
        self._study = study
        self._drives = drives
        self._records = TrialRecords(kept, self._costs)
        self._live: dict[int, optuna.trial.Trial] = {}

    def trial_folder(self, number: int) -> Path:
        """Where a trial keeps its recipe, reports and checkpoints."""
        return self.folder / "trials" / str(number)

    @property
    def records(self) -> TrialRecords:
        """Its trials as they are now, and what is known of all together."""
        if not self._drives:
            self._records.read_all()
        return self._records

    @property
    def trials(self) -> list[TrialRecord]:
        """Its own trials in the order of their numbers, those told infeasible included."""
        return list(self.records)

    def trial(self, number: int) -> TrialRecord:
        """One trial."""
        return self.records[number]

    @property
    def num_remaining(self) -> int:
        """Trials that the budget still allows to ask for."""
        return self.section.trials - self.records.num_used

    @property
    def has_work(self) -> bool:
        """Tells whether a trial is unfinished, or may be asked for."""
        return self.num_remaining > 0 or bool(self.records.unfinished)

    @property
    def winner(self) -> Winner | None:
        """What `settle` kept last."""
        raw = self._study.user_attrs.get("winner")
        return None if raw is None else Winner.model_validate(raw)

    @property
    def memory_factor(self) -> float:
        """What the prediction of memory is multiplied by, as trials that ran out have taught."""
        return float(self._study.user_attrs.get("memory_factor", 1.0))

    def keep_memory_factor(self, factor: float) -> None:
        """Keeps that factor for the next driver too."""
        self._study.set_user_attr("memory_factor", factor)

    @property
    def seconds(self) -> float:
        """Wall time of searching, over all drivers."""
        return float(self._study.user_attrs.get("seconds", 0.0))

    def keep_seconds(self, seconds: float) -> None:
        """Keeps that time for the next driver too."""
        self._study.set_user_attr("seconds", seconds)

    def settle(self, winner: Winner) -> None:
        """Keeps what became of the best trial."""
        self._study.set_user_attr("winner", winner.model_dump(mode="json"))

    @property
    def facts(self) -> StudyFacts:
        """What its trials share."""
        return StudyFacts.model_validate(self._study.user_attrs["facts"])

    def enqueue(self, points: Sequence[Mapping[str, Any]], *, again: bool = False) -> None:
        """Puts settings in front, each once however often it is called.

        Args:
            points: Parameter name → value (a section choice by its label); what a point leaves out
                is sampled.
            again: Whether to try a point that there is a trial of once more.
        """
        own = [f for f in self._study.get_trials(deepcopy=False) if EARLIER not in f.user_attrs]
        known = [f.system_attrs.get("fixed_params", f.params) for f in own]
        for point in points:
            if again or dict(point) not in known:
                self._study.enqueue_trial(dict(point))
                known.append(dict(point))
        self._records.read_new()

    @property
    def taken(self) -> list[str]:
        """What `take` has taken."""
        return list(self._study.user_attrs.get("taken", []))

    def take(
        self, what: str, space: Sampled, points: Sequence[dict[str, Any]], trials: Sequence[Earlier]
    ) -> None:
        """Takes points and history over from another study, each once however often it is called.

        Args:
            what: Names that study, and how it is used.
            space: Of this study; it has all those trials.
            points: Are tried first.
            trials: Are what the sampler learns from. They use no budget and cannot win.
        """
        from optuna.trial import FixedTrial, create_trial

        self.enqueue(points)
        frozen = self._study.get_trials(deepcopy=False)
        known = {f.user_attrs.get(EARLIER) for f in frozen}
        for trial in trials:
            if trial.source in known:
                continue
            fixed = FixedTrial(trial.params)
            space.sample(self._suggest(fixed))
            self._study.add_trial(
                create_trial(
                    params=fixed.params,
                    distributions=fixed.distributions,
                    values=[trial.metrics[o.metric] for o in self.section.objectives],
                    user_attrs={EARLIER: trial.source},
                )
            )
        self._records.read_new()
        self._study.set_user_attr("taken", [*self.taken, what])

    def enqueue_rerun(self, number: int, point: Mapping[str, Any]) -> None:
        """Puts a re-run of another study's trial in front, marked with that trial's number."""
        self._study.enqueue_trial(dict(point), user_attrs={"rerun_of": number})
        self._records.read_new()

    def ask(self, space: Sampled) -> Asked | None:
        """Proposes the next trial, or None where a grid has no new point.

        A point that cannot be is told so and another is asked for.

        Raises:
            ConfigError: One impossible point after another, or a grid over a continuous range.
        """
        reason, is_grid = "", self.section.sampler == "grid"
        for _ in range(_MAX_INFEASIBLE_IN_A_ROW):
            trial = self._study.ask()
            try:
                recipe = space.sample(self._suggest(trial))
            except _EndlessGridError as error:
                self._refuse(trial, str(error))
                raise
            except ConfigError as error:
                reason = str(error)
                self._refuse(trial, reason)
                if is_grid and self._same(trial) and self._records.num_used:
                    return None
                continue
            if is_grid and any(t.uses_budget for t in self._same(trial)):
                self._refuse(trial, "this point has been tried")
                if "fixed_params" in self._records.frozen(trial.number).system_attrs:
                    continue  # it was asked for by name, and says nothing of the others
                return None
            return self._proposed(trial, recipe)
        raise ConfigError(
            f"{_MAX_INFEASIBLE_IN_A_ROW} proposed points in a row are impossible; the last one: "
            f"{reason}"
        )

    def unfinished(self, space: Sampled) -> list[Asked]:
        """Returns the trials that a dead driver left running, with their recipes.

        One without a recipe yet gets the same values again, for its seed is its number.

        Raises:
            ConfigError: The space makes another recipe of a trial's values than it did.
        """
        import optuna

        running = (optuna.trial.TrialState.RUNNING,)
        left = self._study.get_trials(deepcopy=False, states=running)
        found = [self.take_up(frozen.number, space) for frozen in left]
        return [asked for asked in found if asked is not None]

    def take_up(self, number: int, space: Sampled) -> Asked | None:
        """Returns one trial that nobody runs any more; None where its values are impossible now.

        Raises:
            ConfigError: The space makes another recipe of its values than it did.
        """
        frozen, trial = self._records.frozen(number), self._trial(number)
        if (before := frozen.user_attrs.get(CONTINUES)) is not None:
            move_folder(self.trial_folder(before), self.trial_folder(number))  # a driver was killed
        try:
            recipe = space.sample(self._suggest(trial))
        except ConfigError as error:
            self._refuse(trial, str(error))
            return None
        digest = trial_digest(recipe)
        if frozen.user_attrs.get("recipe_digest", digest) != digest:
            raise ConfigError(
                f"trial {number} of study {self.folder.name!r} was proposed as another recipe; "
                "use the study's own recipe, or give this one another name"
            )
        return self._proposed(trial, recipe)

    def resume(self, number: int) -> int:
        """Lets an ended trial go on as a running one with another number, which takes its folder.

        What was told of a trial stays told; the new one has its reports and counts instead of it.
        """
        import optuna

        ended = self._records.frozen(number)
        facts = {k: v for k, v in ended.user_attrs.items() if k not in ("reason", "infeasible")}
        self._study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState.RUNNING,
                params=ended.params,
                distributions=ended.distributions,
                user_attrs=facts | {CONTINUES: number},
                intermediate_values=ended.intermediate_values,
            )
        )
        again = self._records.read_new()
        move_folder(self.trial_folder(number), self.trial_folder(again))
        return again

    def report(self, number: int, steps: int, metrics: Mapping[str, float]) -> None:
        """Records a report of a running trial; a step that is known already is left as it is."""
        known, trial = self.trial(number), self._live[number]
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        searched = self.section.objectives[0].metric
        is_single = len(self._study.directions) == 1  # Optuna keeps no reports of several
        with while_running():
            if is_single and searched in finite and steps not in known.reports:
                trial.report(finite[searched], steps)
            if steps >= known.steps:
                trial.set_user_attr("metrics", finite)
                trial.set_user_attr("steps", steps)
        self._records.read(number)

    def note(self, number: int, **facts: str | float) -> None:
        """Keeps facts beside a running trial: `executor`, `seconds`, `tokens`, why `paused`."""
        with while_running():
            for name, value in facts.items():
                self._live[number].set_user_attr(name, value)
        self._records.read(number)

    def refuse(self, number: int, reason: str) -> None:
        """Ends a trial that turns out to be impossible, before it was run or when it ran out."""
        self._refuse(self._live.pop(number), reason)

    def tell(self, number: int, outcome: Outcome, *, reason: str | None = None) -> None:
        """Ends a trial; one that has ended already stays as it is.

        A complete trial whose searched metrics are missing or not numbers has failed.
        """
        from optuna.trial import TrialState as State

        self._records.read(number)  # somebody may have ended it in a dashboard
        known = self.trial(number)
        if not known.is_unfinished:
            return
        missing = [o.metric for o in self.section.objectives if o.metric not in known.metrics]
        if outcome == "complete" and missing:
            outcome, reason = "failed", f"no finite value of {', '.join(missing)} was reported"
        trial = self._live.pop(number, None) or self._trial(number)
        if reason is not None:
            trial.set_user_attr("reason", reason)
        if outcome == "complete":
            values = [known.metrics[o.metric] for o in self.section.objectives]
            self._study.tell(trial, values, State.COMPLETE)
        else:
            self._study.tell(trial, state=State.PRUNED if outcome == "stopped" else State.FAIL)
        self._records.read(number)

    def best(self) -> TrialRecord:
        """Returns the complete trial with the best first metric; the earlier one of two equals.

        Raises:
            TrainingError: No trial is complete.
        """
        front = self.front()
        if not front:
            reasons = sorted({t.reason for t in self.trials if t.reason is not None})
            raise TrainingError(
                f"no trial of study {self.folder.name!r} is complete"
                + (f"; the failures say: {'; '.join(reasons)}" if reasons else "")
            )
        return min(front, key=lambda t: (self._costs(t)[0], t.number))

    def front(self) -> list[TrialRecord]:
        """Returns the complete trials that no other one beats in every searched metric."""
        return self.records.front

    def _costs(self, trial: TrialRecord) -> list[float]:
        """The searched metrics, smaller being better."""
        return [
            trial.metrics[o.metric] * (1 if o.mode == "min" else -1)
            for o in self.section.objectives
        ]

    def _suggest(self, trial: optuna.trial.BaseTrial) -> Suggest:
        is_grid = self.section.sampler == "grid"

        def suggest(name: str, space: Space) -> Any:
            if isinstance(space, Int):
                return trial.suggest_int(name, space.low, space.high)
            if isinstance(space, Float):
                if is_grid:
                    raise _EndlessGridError(str(endless_grid(name)))
                return trial.suggest_float(name, space.low, space.high, log=space.log)
            return trial.suggest_categorical(name, list(space.values))

        return suggest

    def _proposed(self, trial: optuna.trial.Trial, recipe: Recipe) -> Asked:
        trial.set_user_attr("recipe_digest", trial_digest(recipe))
        self._records.read(trial.number)
        self._live[trial.number] = trial
        return Asked(trial.number, recipe, dict(trial.params))

    def _refuse(self, trial: optuna.trial.Trial, reason: str) -> None:
        import optuna

        trial.set_user_attr("infeasible", reason)
        self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
        self._records.read(trial.number)

    def _same(self, trial: optuna.trial.Trial) -> list[TrialRecord]:
        """The other trials of the same point."""
        return [t for t in self.trials if t.number != trial.number and t.params == trial.params]

    def _trial(self, number: int) -> optuna.trial.Trial:
        import optuna

        return optuna.trial.Trial(self._study, self._records.frozen(number)._trial_id)


class _EndlessGridError(ConfigError):
    """A grid was asked of a continuous range."""


@contextmanager
def open_study(
    folder: Path,
    section: SearchSection,
    facts: StudyFacts,
    *,
    progress: Progress = QUIET,
    patience_s: float = PATIENCE_S,
) -> Iterator[Study]:
    """Opens a study to drive it, or begins it; nobody else can meanwhile.

    A journal line that a crash cut in half is dropped: at most that one operation is lost, and it
    is done again. Optuna's own lock file, left behind by a killed process, is removed.

    Args:
        folder: Of the study.
        section: How it searches, and where it is kept.
        facts: What must not change.
        progress: Told when a database does not answer.
        patience_s: So long a database is waited for.

    Raises:
        ConfigError: Another process drives the study; the study is of another space, model or data;
            the journal is damaged before its end; the folder cannot be written; the database cannot
            be opened.
        TrainingError: The database went away and did not come back.
    """
    with (
        storage_to_drive(folder, section, progress=progress, patience_s=patience_s) as kept,
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", category=UserWarning, module="optuna")
        study = _open(folder, section, facts, kept)
        TrialEvents(study).say_missed()
        yield study


@contextmanager
def edit_study(folder: Path, section: SearchSection) -> Iterator[Study | None]:
    """Opens a study for a change while nobody drives it; yields None where a process does.

    Raises:
        ConfigError: There is none, or it cannot be opened.
    """
    with ExitStack() as opened:
        try:
            kept = opened.enter_context(storage_to_drive(folder, section))
        except StudyTakenError:
            yield None
            return
        yield _load(folder, section, kept, drives=True)


def read_study(folder: Path, section: SearchSection) -> Study:
    """Opens a study to look at it, while another process may drive it.

    Raises:
        ConfigError: There is none, or its database cannot be opened.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return _load(folder, section, storage_to_read(folder, section), drives=False)


def _load(folder: Path, section: SearchSection, kept: Kept, *, drives: bool) -> Study:
    import optuna

    try:
        study = optuna.load_study(study_name=kept.name, storage=kept.storage)
    except KeyError:  # its driver died before it had begun
        raise ConfigError(f"there is no study in {folder} yet; `graft tune` makes one") from None
    return Study(folder, kept, study, section, drives=drives)


def _open(folder: Path, section: SearchSection, facts: StudyFacts, kept: Kept) -> Study:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        storage=kept.storage,
        study_name=kept.name,
        directions=["minimize" if o.mode == "min" else "maximize" for o in section.objectives],
        sampler=seeded_sampler(section),
        load_if_exists=True,
    )
    known = study.user_attrs.get("facts")
    if known is None:
        study.set_user_attr("facts", facts.model_dump(mode="json"))
    else:
        _require_same(folder.name, StudyFacts.model_validate(known), facts)
    return Study(folder, kept, study, section, drives=True)


def _require_same(name: str, known: StudyFacts, given: StudyFacts) -> None:
    changed = known.differences(given)
    if changed:
        raise ConfigError(
            f"study {name!r} was begun with {' and '.join(changed)} than this recipe has; its "
            "trials would not compare. Give the recipe another name, or restore what it was"
        )
