"""Between Ray Tune and the study of record: who is asked next, what is told, when a trial stops.

Tune schedules; the study remembers. Nothing here is pickled to come back: a driver that died is
replaced by one that reads the study and the trials' folders.
"""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ray.tune.search import Searcher

from graft.core.errors import ConfigError, MissingDependencyError
from graft.core.files import write_json
from graft.core.sizes import format_bytes
from graft.engine.checkpoint import newest_step
from graft.engine.costs import predict_costs
from graft.engine.run_folder import CHECKPOINTS, RECIPE_FILE, read_reports
from graft.recipe.sections import Recipe
from graft.runtime.budget import Budget
from graft.runtime.scheduler import STEP, TOKENS
from graft.runtime.seats import Seats
from graft.runtime.study import Study
from graft.runtime.trials import (
    MEASURED,
    STOPPED_BY_PERSON,
    Asked,
    Failure,
    Loss,
    failure_of,
    forget_end,
    metrics_of,
)

if TYPE_CHECKING:
    from graft.engine.memory.cap import MemoryCap
    from graft.engine.memory.stand_ins import DeviceType
    from graft.recipe.space import RecipeSpace

Executor = Literal["packed", "dedicated"]


def executor_of(recipe: Recipe, base: Recipe) -> Executor:
    """Says where a trial runs.

    Args:
        recipe: Of the trial.
        base: The space's example, which packs load their base by.

    Raises:
        ConfigError: `search.executor` is `packed` and this recipe cannot be.
    """
    scale, of_pack = recipe.scale, base.scale.gradient_checkpointing
    obstacles = [
        (not type(recipe.method).packable, f"method {recipe.method.type} has no packed form"),
        (scale.max_workers > 1, f"scale.workers is {scale.max_workers}"),
        (scale.zero_stage > 0, f"scale.zero_stage is {scale.zero_stage}"),
        (scale.backend == "deepspeed", "scale.backend is deepspeed"),
        (
            scale.gradient_checkpointing != of_pack,
            f"scale.gradient_checkpointing is not {of_pack}, as it is for the layers of the pack",
        ),
    ]
    reasons = [words for is_so, words in obstacles if is_so]
    if recipe.search.executor == "dedicated" or (reasons and recipe.search.executor == "auto"):
        return "dedicated"
    if reasons:
        raise ConfigError(
            f"search.executor packed: this trial cannot be packed: {'; '.join(reasons)}; "
            "use auto or dedicated"
        )
    return "packed"


class _Feasible:
    """A space whose recipes have an executor, train on the device and fit; others are refused."""

    def __init__(
        self, space: RecipeSpace, memory: MemoryCap | None, admit: Callable[[Recipe], object]
    ) -> None:
        self.unasked = space
        self._memory = memory
        self._admit = admit

    def sample(self, suggest: Any) -> Recipe:
        recipe = self.unasked.sample(suggest)
        self._require(recipe)
        return recipe

    def examples(self) -> list[Recipe]:
        found = []
        for recipe in self.unasked.examples():
            with suppress(ConfigError):
                self._require(recipe)
                found.append(recipe)
        return found

    def executor_of(self, recipe: Recipe) -> Executor:
        return executor_of(recipe, self.unasked.example())

    def obstacle(self, recipe: Recipe, *, corrected: bool = True) -> str | None:
        """Says why a recipe is refused; None where it is not.

        Args:
            recipe: Complete.
            corrected: Whether what trials that ran out have taught counts too.
        """
        try:
            self._require(recipe, corrected=corrected)
        except ConfigError as error:
            return str(error)
        return None

    def _require(self, recipe: Recipe, *, corrected: bool = True) -> None:
        self.executor_of(recipe)
        self._admit(recipe)
        if self._memory is not None:
            _require_device(recipe, self._memory.limits.device)
            (self._memory if corrected else self._memory.uncorrected).require(recipe)


def _require_device(recipe: Recipe, device: DeviceType) -> None:
    import torch

    from graft.engine.trainable import require_trainable

    try:
        require_trainable(recipe, torch.device(device))
    except MissingDependencyError as error:  # as impossible as any other point
        raise ConfigError(str(error)) from error


class TrialQueue:
    """Which trial comes next for which executor: those left running first, then new ones.

    Args:
        study: Is asked.
        space: Is sampled.
        turn: So many trials of the other executor may wait before it gets its turn.
        memory: What device there is and what it may be given; None is not looked at.
        admit: Raises a `ConfigError` where the cluster is too small for a recipe.
        budget: Of hours and tokens; None begins to count the hours now.
        only_begun: Whether no trial is asked for beyond those that the study has begun, and the
            weights of all are kept.
    """

    def __init__(
        self,
        study: Study,
        space: RecipeSpace,
        *,
        turn: int,
        memory: MemoryCap | None = None,
        admit: Callable[[Recipe], object] = lambda recipe: None,
        budget: Budget | None = None,
        only_begun: bool = False,
    ) -> None:
        self.study = study
        self.budget = budget or Budget(study)
        self.memory = memory
        self.only_begun = only_begun
        self._space = _Feasible(space, memory, admit)
        self._turn = turn
        self._waiting: dict[Executor, deque[Asked]] = {"packed": deque(), "dedicated": deque()}
        self._is_exhausted = only_begun
        self._held: dict[int, str] = {}
        """Half-trained trial → why it cannot go on here and now."""
        self._fault: str | None = None
        """Why no other trial can succeed either."""
        self.num_resumed = 0
        self.refill()

    def refill(self) -> None:
        """Puts the trials that nobody runs any more back in line.

        One that the cluster is too small for by now is held where it has a checkpoint; else it is
        an impossible point.
        """
        for queue in self._waiting.values():
            queue.clear()
        self._held.clear()
        for asked in self.study.unfinished(self._space.unasked):
            self._line_up(asked)
        self.num_resumed = sum(len(queue) for queue in self._waiting.values())

    def take_up(self, number: int) -> None:
        """Puts one trial in line that nobody runs any more."""
        asked = self.study.take_up(number, self._space.unasked)
        if asked is not None:
            self._line_up(asked)

    def withdraw(self, number: int) -> None:
        """Takes a trial out of the line."""
        for executor, queue in self._waiting.items():
            self._waiting[executor] = deque(a for a in queue if a.number != number)
        self._held.pop(number, None)

    def _line_up(self, asked: Asked) -> None:
        reason = self._space.obstacle(asked.recipe)
        if reason is None:
            self._waiting[self._space.executor_of(asked.recipe)].append(asked)
        elif self._is_begun(asked) and self._space.obstacle(asked.recipe, corrected=False):
            self._held[asked.number] = reason
        else:
            self.study.refuse(asked.number, reason)

    def _is_begun(self, asked: Asked) -> bool:
        return newest_step(self.study.trial_folder(asked.number) / CHECKPOINTS) > 0

    def turn_of(self) -> Executor | None:
        """Returns the executor whose turn it is, or None where nothing is left to do.

        Raises:
            ConfigError: All that is left are trials that are half-trained and cannot go on here; no
                trial reports a searched metric.
        """
        if self._fault is not None:
            raise ConfigError(self._fault)
        if self.budget.spent is not None:
            return None
        if not any(self._waiting.values()) and (asked := self._ask()) is not None:
            self._waiting[self._space.executor_of(asked.recipe)].append(asked)
        longest = max(self._waiting, key=lambda executor: len(self._waiting[executor]))
        if not self._waiting[longest] and self._held:
            held = "; ".join(f"trial {number}: {reason}" for number, reason in self._held.items())
            raise ConfigError(
                f"what is left of study {self.study.folder.name!r} is half-trained and cannot go "
                f"on here: {held}. The checkpoints are kept: the same command goes on from them "
                "where there is room again"
            )
        return longest if self._waiting[longest] else None

    def next(self, executor: Executor) -> Asked | None:
        """Returns the next trial for an executor, or None where its turn is over."""
        if self._fault is not None or self.budget.spent is not None:
            return None
        while self._waiting[executor]:
            waiting = self._waiting[executor].popleft()
            if self._still_fits(waiting):
                return waiting
        other: Executor = "packed" if executor == "dedicated" else "dedicated"
        while len(self._waiting[other]) < self._turn:
            asked = self._ask()
            if asked is None:
                return None
            if self._space.executor_of(asked.recipe) == executor:
                return asked
            self._waiting[other].append(asked)
        return None

    def first(self, executor: Executor) -> Recipe:
        """Returns the recipe of the first trial in line for an executor whose turn it is."""
        return self._waiting[executor][0].recipe

    def put_back(self, asked: Asked, executor: Executor) -> None:
        """Puts a trial first in line that nobody runs any more."""
        self._waiting[executor].appendleft(asked)

    @property
    def is_exhausted(self) -> bool:
        """Every point of the space has been tried."""
        return self._is_exhausted

    def give_up(self, fault: str) -> None:
        """Begins no more trials; `turn_of` says why."""
        self._fault = fault

    def recipes_for(self, executor: Executor) -> list[Recipe]:
        """Returns what an executor may be given: the trials in line for it and the examples."""
        waiting = [asked.recipe for asked in self._waiting[executor]]
        examples = self._space.examples()
        return waiting + [r for r in examples if self._space.executor_of(r) == executor]

    def learn(self, together: Sequence[Asked], needed_bytes: int) -> str:
        """Corrects the prediction of memory by trials that ran out; returns that in words."""
        if self.memory is None:
            return f"it asked for at least {format_bytes(needed_bytes)}"
        words = self.memory.learn([asked.recipe for asked in together], needed_bytes)
        self.study.keep_memory_factor(self.memory.factor)
        return words

    def _still_fits(self, asked: Asked) -> bool:
        """Asks again: a trial that ran out meanwhile may have corrected the prediction."""
        reason = self.memory.refusal(asked.recipe) if self.memory is not None else None
        if reason is not None:
            self.study.refuse(asked.number, reason)
        return reason is None

    def _ask(self) -> Asked | None:
        if self._is_exhausted or self.study.num_remaining <= 0:
            return None
        asked = self.study.ask(self._space)
        self._is_exhausted = asked is None
        return asked


class StudySearcher(Searcher):
    """Tune's view of the study: asks for trials, tells what became of them.

    A trial that ended without a reason of its own, because its seat is lost, is not told anything:
    it is run again, in this turn where there are other seats. Where memory was the reason, the one
    of them that needs most turns out to be infeasible.

    Args:
        queue: Gives the trials.
        executor: Whose trials.
        seats: Where they run.
    """

    def __init__(self, queue: TrialQueue, executor: Executor, seats: Seats | None = None) -> None:
        super().__init__()
        self._queue = queue
        self.executor = executor
        self._seats = seats or Seats()
        self._trials: dict[str, Asked] = {}
        self.loss: Loss | None = None
        """Of the seats of all trials, which are run again."""
        self._blamed: dict[int, Failure] = {}
        """Trial that a seat was lost for → why."""
        self._without_runner: set[int] = set()
        """Trials whose runner went without a word."""
        self._by_person: set[int] = set()
        """Trials that a person stops."""

    def stop(self, number: int) -> None:
        """Says that a person is the reason why Tune is about to end a trial."""
        self._by_person.add(number)

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Gives Tune the next trial's number; its recipe is in its folder."""
        if self.loss is None and not self._seats.has_seat():
            return None  # Tune asks again
        asked = None if self.loss else self._queue.next(self.executor)
        if asked is None and self._trials and not self.loss:
            return None  # a person may yet propose or take up a trial; Tune asks again
        if asked is None:
            return str(Searcher.FINISHED)
        study = self._queue.study
        folder = study.trial_folder(asked.number)
        write_json(folder / RECIPE_FILE, asked.recipe.model_dump(mode="json"))
        if self._queue.memory is not None:
            predict_costs(folder, asked.recipe, self._queue.memory)
        study.note(asked.number, executor=self.executor, paused="")
        forget_end(folder)
        self._trials[trial_id] = asked
        for report in read_reports(folder):
            self._report(asked.number, report)
        return {
            "trial": asked.number,
            "folder": str(folder),
            "origin": str(study.trial_folder(study.records.origin(asked.number))),
            "steps": asked.recipe.train.steps,
            "stop_at_loss": asked.recipe.train.stop_at_loss,
            "params": asked.params,
            **self._seats.take(asked, folder),
        }

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Records a report."""
        self._report(self._trials[trial_id].number, result)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tells the study the truth: complete, stopped, failed, infeasible, or nothing at all.

        A trial that is paused or was interrupted from outside is told nothing; it will be taken up
        by the next driver.
        """
        asked = self._trials.pop(trial_id, None)
        if asked is None:
            return
        study, number = self._queue.study, asked.number
        if error:
            failure = self._failure(asked)
            if failure is None:
                return
            if failure.needed_bytes is None:
                study.tell(number, "failed", reason=failure.reason)
            else:
                study.refuse(number, failure.reason)
        else:
            self._end(asked, result)
        if not self._queue.only_begun:
            drop_needless_checkpoints(study)

    def _end(self, asked: Asked, result: Mapping[str, Any] | None) -> None:
        study, number = self._queue.study, asked.number
        if result is not None and STEP in result:
            self._report(number, result)
        trial = study.trial(number)
        if asked.recipe.train.ends_with({**trial.metrics, STEP: trial.steps}):
            study.tell(number, "complete")
            self._require_metrics(number)
        elif number in self._by_person:
            study.tell(number, "stopped", reason=STOPPED_BY_PERSON)
        elif result is not None and STEP in result and trial.state != "paused":
            study.tell(number, "stopped")

    def _require_metrics(self, number: int) -> None:
        """Ends a search for what trials do not report, after the first that has ended so."""
        study = self._queue.study
        if study.records.front:
            return
        reports = read_reports(study.trial_folder(number))
        known = sorted({n for report in reports for n in report if n.startswith(MEASURED)})
        absent = [o.metric for o in study.section.objectives if o.metric not in known]
        if absent:
            self._queue.give_up(
                f"search.objectives names {', '.join(absent)}, which no trial reports: trial "
                f"{number} has ended and reported {', '.join(known)}. Name one of these, under "
                "another name of the recipe, for this study is of the old objectives"
            )

    def _failure(self, asked: Asked) -> Failure | None:
        """Says why a trial failed; None where it was lost with its seat, and is run again."""
        failure = failure_of(self._queue.study.trial_folder(asked.number))
        if failure is not None:
            return self._learn(failure, [asked])
        loss = self._seats.loss_of(asked.number)
        if loss is None:
            return self._without_a_word(asked)
        if loss.needed_bytes is None and self._seats.goes_on_without(asked.number):
            self._queue.put_back(asked, self.executor)
            return None
        self.loss = self.loss or loss
        self._blame(asked, loss)
        return self._blamed.get(asked.number)

    def _without_a_word(self, asked: Asked) -> Failure | None:
        """Runs a trial once more whose runner is gone; the second time it has failed."""
        if asked.number in self._without_runner:
            return Failure(reason="its runner ended without a word")
        self._without_runner.add(asked.number)
        self._queue.put_back(asked, self.executor)
        return None

    def _blame(self, asked: Asked, loss: Loss) -> None:
        """Finds the trial that a pack ran out of memory for, once: the one that needs most."""
        if loss.needed_bytes is None or self._blamed:
            return
        running, memory = [asked, *self._trials.values()], self._queue.memory
        together = [trial for trial in running if trial.number in loss.trials] or running
        sizes = {a.number: memory.need([a.recipe]) if memory else a.number for a in together}
        failure = Failure(reason="out of memory", needed_bytes=loss.needed_bytes)
        self._blamed[max(sizes, key=lambda number: sizes[number])] = self._learn(failure, together)

    def _learn(self, failure: Failure, together: Sequence[Asked]) -> Failure:
        """Adds what is learned of a failure for lack of memory."""
        if failure.needed_bytes is None:
            return failure
        words = self._queue.learn(together, failure.needed_bytes)
        return failure.model_copy(update={"reason": f"{failure.reason}: {words}"})

    def _report(self, number: int, result: Mapping[str, Any]) -> None:
        metrics = metrics_of(result)
        self._queue.study.report(number, int(result[STEP]), metrics)
        tokens = int(result.get(TOKENS, 0))  # runs of older versions did not count them
        self._queue.study.note(number, seconds=float(result["seconds"]), tokens=tokens)

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any
    ) -> bool:
        """Accepts Tune's call; metrics and modes are the study's."""
        return True

    def save(self, checkpoint_path: str) -> None:
        """Leaves a note in Tune's own snapshot; there is nothing to restore from it."""
        Path(checkpoint_path).write_text(f"the study of record is {self._queue.study.folder}\n")

    def restore(self, checkpoint_path: str) -> None:
        """Refuses: the same command, run again, continues the study."""
        raise ConfigError("a search is not restored from Tune's snapshot; run `graft tune` again")

    def __reduce__(self) -> tuple[Any, ...]:
        return (Searcher, ())


def drop_needless_checkpoints(study: Study) -> None:
    """Removes the state of trials that nobody goes on from: ended as they should, not the best."""
    for number in study.records.take_needless():
        shutil.rmtree(study.trial_folder(number) / CHECKPOINTS, ignore_errors=True)
