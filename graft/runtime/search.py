"""The search: Tuners that take turns on one study until its budget is spent."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import ray
from ray import tune
from ray.tune.schedulers import FIFOScheduler

from graft.core.errors import TrainingError
from graft.core.progress import Progress, Task
from graft.engine.run_folder import objective_figures
from graft.runtime.attended import Attendant, AttendedScheduler
from graft.runtime.budget import Budget
from graft.runtime.callbacks import TrialCallback
from graft.runtime.dedicated import DedicatedSeats, DedicatedTrial
from graft.runtime.nodes import await_node, find_limits, prepare_ops
from graft.runtime.pack_actor import StartedPack, end_packs, start_packs
from graft.runtime.packed import PackedTrial, SeatCallback
from graft.runtime.packs import Packs
from graft.runtime.placement import (
    ON_HEAD,
    bare_processes,
    node_places,
    orphans_freed,
    worker_needs,
)
from graft.runtime.samplers import budget_warning, choose_sampler
from graft.runtime.scheduler import BudgetScheduler, StudyScheduler
from graft.runtime.searcher import Executor, StudySearcher, TrialQueue
from graft.runtime.session import RaySession
from graft.runtime.study import Study
from graft.runtime.study_events import TrialEvents
from graft.runtime.tracking import WandbTracker
from graft.runtime.trial_table import TrialTable
from graft.runtime.trials import Loss, metrics_of

if TYPE_CHECKING:
    from graft.engine.memory.cap import MemoryCap
    from graft.recipe.sections import Recipe, ScaleSection
    from graft.recipe.space import RecipeSpace
    from graft.runtime.shared_rows import SharedRows

Stage = Literal["search", "finalists"]
"""`finalists`: what is trained has been begun already, and nothing is sampled."""

_TAKEN_UP: dict[Stage, str] = {"search": "resume", "finalists": "rerun"}
_MAX_VAIN_ROUNDS = 3
_NO_WORDS = "their processes end without a word"


class Search:
    """One driver's work on a study.

    Args:
        study: Opened to be driven.
        space: What is searched.
        budget: Of the study.
        longest: Steps or tokens of the space's longest trial, whichever the rungs count.
        home: Seen by every node.
        session: The Ray cluster.
        progress: Told of every trial.
        rows: Of its recipes; those that are missing are prepared where they are trained on.
        started: Processes for the first packs, which are taken or ended, and the list emptied.
        searched: The search whose finalists the study trains again, and its space; None where it is
            the search itself.
    """

    def __init__(
        self,
        study: Study,
        space: RecipeSpace,
        *,
        budget: Budget,
        longest: int,
        home: Path,
        session: RaySession,
        progress: Progress,
        rows: SharedRows | None = None,
        started: list[StartedPack] | None = None,
        searched: tuple[Study, RecipeSpace] | None = None,
    ) -> None:
        self._study = study
        self._space = space
        self._budget = budget
        self._longest = longest
        self._home = home
        self._session = session
        self._rows = rows
        self._started = started if started is not None else []
        self._section = study.section
        self._stage: Stage = "search" if searched is None else "finalists"
        self._watch = TrialWatch(study, progress, self._stage)
        self._attendant = Attendant(study, space, budget, progress, searched=searched)
        track = space.sections().track
        self._trackers = [] if track.wandb == "off" else [WandbTracker(study, track, progress)]

    def run(self) -> None:
        """Runs until a budget is spent or a grid is exhausted.

        Raises:
            ConfigError: The cluster's devices can train no point of the space.
            TrainingError: Trials are lost again and again: their processes die.
            StoppedError: A person ended the search.
        """
        try:
            self._run()
            self._budget.pause_rest()
        finally:
            self._budget.keep()

    def _run(self) -> None:
        import torch

        from graft.engine.trainable import require_any_trainable

        self._session = await_node(self._space.example(), self._session, self._watch.progress)
        memory = self._memory_cap()
        require_any_trainable(self._space.examples(), torch.device(memory.limits.device))
        self._attendant.begin()
        queue = TrialQueue(
            self._study,
            self._space,
            turn=self._section.pack_slots,
            memory=memory,
            admit=worker_needs,
            budget=self._budget,
            only_begun=self._stage == "finalists",
        )
        prepare_ops(self._space.scales(), self._watch.progress.note)
        if self._stage == "search":
            self._say_how()
        if queue.num_resumed:
            self._watch.say(_TAKEN_UP[self._stage], trials=queue.num_resumed)

        def turn(executor: Executor) -> Loss | None:
            with self._watch:
                if executor == "packed":
                    return self._packed_turn(queue, memory)
                with orphans_freed():
                    return self._dedicated_turn(queue, memory)

        take_turns(queue, turn)
        if queue.is_exhausted and self._stage == "search":
            ended, budget = self._study.records.num_ended, self._section.trials
            self._watch.say("exhausted", trials=ended)
            self._watch.progress.note(
                f"every point of the space has been tried: the search ends with {ended} of "
                f"{budget} trials"
            )

    def _say_how(self) -> None:
        """Tells people and events which sampler is taken, and what the budget amounts to."""
        chosen = choose_sampler(self._space)
        self._watch.say("sampler", name=chosen.name, reason=chosen.reason)
        self._watch.progress.note(f"sampler {chosen.name}: {chosen.reason}")
        if warning := budget_warning(self._space):
            self._watch.say("warning", words=warning)
            self._watch.progress.note(warning)

    def _memory_cap(self) -> MemoryCap:
        from graft.engine.memory.cap import MemoryCap
        from graft.engine.memory.shape import ModelShape
        from graft.models import find_config

        example = self._space.example()
        limits = find_limits(example, self._session)._replace(factor=self._study.memory_factor)
        return MemoryCap(ModelShape.of(find_config(example.model, self._home)), limits)

    def _packed_turn(self, queue: TrialQueue, memory: MemoryCap) -> Loss | None:
        recipe = self._space.example()
        started = self._started.copy() or start_packs(recipe, self._session)
        self._started.clear()
        with (
            bare_processes(),
            Packs(
                recipe,
                self._home,
                slots=self._section.pack_slots,
                started=started,
                memory=memory,
                needed_bytes=memory.beside_process(queue.first("packed")),
                rows=self._rows,
                progress=self._watch.progress,
                say=self._watch.say,
            ) as packs,
        ):
            return self._fit(
                tune.with_resources(PackedTrial, ON_HEAD),
                queue,
                StudySearcher(queue, "packed", packs),
                concurrent=packs.most_trials,
                config={},
                callbacks=[SeatCallback(packs)],
            )

    def _dedicated_turn(self, queue: TrialQueue, memory: MemoryCap) -> Loss | None:
        end_packs(self._started)
        recipes = queue.recipes_for("dedicated")
        places = node_places(worker_needs(recipes[0]).resources)
        workers = most_workers(self._space.scales(), places)
        concurrent = num_concurrent(recipes, memory, places, workers)
        cpus = ray.cluster_resources().get("CPU", 1.0)
        seats = DedicatedSeats(self._study, memory, self._watch.progress)
        return self._fit(
            tune.with_resources(tune.with_parameters(DedicatedTrial, rows=self._rows), ON_HEAD),
            queue,
            StudySearcher(queue, "dedicated", seats),
            concurrent=concurrent,
            config={
                "home": str(self._home),
                "threads": max(1, int(cpus // (concurrent * workers))),
            },
            callbacks=[],
        )

    def _fit(
        self,
        trainable: Any,
        queue: TrialQueue,
        searcher: StudySearcher,
        *,
        concurrent: int,
        config: dict[str, Any],
        callbacks: list[Any],
    ) -> Loss | None:
        """Runs one Tuner to the end of its turn, or until its runner is lost."""
        kind = searcher.executor
        tuner = tune.Tuner(
            trainable,
            param_space=config,
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=AttendedScheduler(
                    self._scheduler(),
                    lambda controller: self._attendant.look(controller, queue, searcher),
                ),
                num_samples=-1,  # the searcher says when it is enough
                max_concurrent_trials=concurrent,
                reuse_actors=kind == "packed",
                trial_name_creator=_trial_name,
                trial_dirname_creator=_trial_name,
            ),
            run_config=tune.RunConfig(
                name=f"{kind}-{uuid.uuid4().hex[:8]}",
                storage_path=str(self._study.folder / "tune"),
                checkpoint_config=tune.CheckpointConfig(
                    checkpoint_at_end=False
                ),  # trials keep their own
                verbose=0,
                callbacks=[self._watch, *self._trackers, *callbacks],
            ),
        )
        try:
            tuner.fit()
        except RuntimeError as error:  # Tune knows no actor that is killed for memory
            if not isinstance(error.__cause__, ray.exceptions.OutOfMemoryError):
                raise
            return Loss(str(error.__cause__))
        finally:  # Tune's own record of the turn is read by nobody, and grows with every trial
            shutil.rmtree(self._study.folder / "tune", ignore_errors=True)
        return searcher.loss

    def _scheduler(self) -> BudgetScheduler:
        section = self._section.scheduler
        if section.type == "none":
            return BudgetScheduler(FIFOScheduler(), self._budget)
        origin, folder = self._study.records.origin, self._study.trial_folder
        ended = {
            folder(origin(trial.number)): (folder(trial.number), trial.steps)
            for trial in self._study.trials
            if trial.has_ended
        }
        asha = StudyScheduler(section, self._section.objectives, self._longest, ended)
        return BudgetScheduler(asha, self._budget)


def take_turns(queue: TrialQueue, turn: Callable[[Executor], Loss | None]) -> None:
    """Gives each executor its turns until nothing is left to do.

    Args:
        queue: Whose trials.
        turn: Runs an executor's trials; returns why their runner was lost, if it was.

    Raises:
        TrainingError: Trials are lost again and again.
    """
    vain_rounds = 0
    while (executor := queue.turn_of()) is not None:
        ended = queue.study.records.num_ended
        loss = turn(executor)
        is_vain = queue.study.records.num_ended == ended and queue.budget.spent is None
        vain_rounds = vain_rounds + 1 if is_vain else 0
        if vain_rounds == _MAX_VAIN_ROUNDS:
            raise TrainingError(
                f"the {executor} trials of study {queue.study.folder.name!r} were lost "
                f"{vain_rounds} times in a row: {loss.words if loss else _NO_WORDS}. The same "
                "command goes on from the checkpoints"
            )
        queue.refill()


def most_workers(scales: Iterable[ScaleSection], places: Sequence[int]) -> int:
    """Counts the workers of the largest run that there are places for, and at least one.

    A run of more is refused when it is proposed; nodes that went meanwhile are waited for.
    """
    return max(1, min(sum(places), max(scale.max_workers for scale in scales)))


def num_concurrent(
    recipes: Sequence[Recipe], memory: MemoryCap, places: Sequence[int], workers: int
) -> int:
    """Counts the dedicated trials that run beside each other.

    Args:
        recipes: That they may have.
        memory: What the machines have.
        places: Workers that each node could hold by its other resources.
        workers: Of the largest of them.
    """
    room = memory.node_room(recipes)
    held = sum(min(room, of_node) for of_node in places)
    return max(1, int(held // workers))


class TrialWatch(TrialCallback):
    """Shows trials to people and keeps `events.jsonl`; a context manager around each turn."""

    def __init__(self, study: Study, progress: Progress, stage: Stage = "search") -> None:
        self._study = study
        self._stage = stage
        self.progress = progress
        self._events = TrialEvents(study)
        self._bars: dict[int, tuple[Task, int]] = {}
        self._table = TrialTable(study, progress)
        self._has_table = False
        self._whole: Task | None = None

    def __enter__(self) -> TrialWatch:
        self._whole = self.progress.task(self._stage, self._study.section.trials, "trial")
        self._whole.advance(self._study.records.num_ended)
        self._has_table = self._table.open()
        return self

    def __exit__(self, *_: object) -> None:
        for bar, _steps in self._bars.values():
            bar.close()
        self._bars = {}
        self._table.close()
        if self._whole is not None:
            self._whole.close()

    def say(self, event: str, **fields: Any) -> None:
        """Appends one line to the study's events."""
        self._events.say(event, **fields)

    def log_trial_start(self, trial: Any) -> None:
        """Opens a bar, or a row of the table."""
        config = trial.config
        self._events.start(config["trial"], config["params"])
        if self._has_table:
            self._table.redraw()
            return
        label = " ".join(f"{k.split('/')[-1]}={_short(v)}" for k, v in config["params"].items())
        bar = self.progress.task(f"trial {config['trial']} {label}", config["steps"])
        self._bars[config["trial"]] = (bar, 0)

    def log_trial_result(self, iteration: int, trial: Any, result: dict[str, Any]) -> None:
        """Moves a bar on."""
        number, metrics = trial.config["trial"], metrics_of(result)
        self._events.report(number, result)
        self._table.redraw()
        if number in self._bars:
            bar, seen = self._bars[number]
            fields = {"loss": metrics.get("train/loss", 0.0)}
            for objective in self._study.section.objectives:
                if objective.metric in metrics:
                    fields[objective.metric] = metrics[objective.metric]
            fields |= objective_figures(metrics)
            fields["tokens/s"] = metrics.get("train/tokens_per_s", 0.0)
            bar.advance(result["steps"] - seen, **fields)
            self._bars[number] = (bar, result["steps"])

    def log_trial_end(self, trial: Any, failed: bool = False) -> None:
        """Closes a bar."""
        number = trial.config["trial"]
        record = self._study.trial(number)
        self._events.end(record)
        self._table.redraw()
        if number in self._bars:
            self._bars.pop(number)[0].close()
        if record.state in ("failed", "infeasible"):
            self.progress.note(f"trial {number} {record.state}: {record.reason}")
        if self._whole is not None and record.has_ended:
            self._whole.advance(1, **self._best_so_far())

    def _best_so_far(self) -> dict[str, float | str]:
        if self._stage == "finalists":
            return {}  # the best of several seeds says nothing
        try:
            best = self._study.best()
        except TrainingError:
            return {}
        searched = self._study.section.objectives[0].metric
        return {"best trial": str(best.number), searched: best.metrics[searched]}


def _trial_name(trial: Any) -> str:
    return f"trial-{trial.config['trial']}-{trial.trial_id}"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
