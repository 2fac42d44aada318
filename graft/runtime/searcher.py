"""Between Ray Tune and the study of record: who is asked next, what is told, when a trial stops.

Tune schedules; the study remembers. Nothing here is pickled to come back: a driver that died is
replaced by one that reads the study and the trials' folders.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from ray.tune.search import Searcher

from graft.core.errors import ConfigError
from graft.core.files import write_json
from graft.engine.run_folder import RECIPE_FILE, read_reports
from graft.recipe.sections import Recipe
from graft.runtime.scheduler import STEP
from graft.runtime.study import Study
from graft.runtime.trials import Asked, Sampled, failure_of, forget_failure

_MEASURED = ("train/", "eval/", "method/", "objective/", "rollout/")

Executor = Literal["packed", "dedicated"]


def executor_of(recipe: Recipe) -> Executor:
    """Says where a trial runs.

    Raises:
        ConfigError: `search.executor` is `packed` and this recipe cannot be.
    """
    scale = recipe.scale
    obstacles = [
        (not type(recipe.method).packable, f"method {recipe.method.type} has no packed form"),
        (scale.max_workers > 1, f"scale.workers is {scale.max_workers}"),
        (scale.zero_stage > 0, f"scale.zero_stage is {scale.zero_stage}"),
        (scale.backend == "deepspeed", "scale.backend is deepspeed"),
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


class _Packable:
    """A space whose recipes have an executor; others are refused like any impossible point."""

    def __init__(self, space: Sampled) -> None:
        self._space = space

    def sample(self, suggest: Any) -> Recipe:
        recipe = self._space.sample(suggest)
        executor_of(recipe)
        return recipe


class TrialQueue:
    """Which trial comes next for which executor: those left running first, then new ones.

    Args:
        study: Is asked.
        space: Is sampled.
        turn: So many trials of the other executor may wait before it gets its turn.
    """

    def __init__(self, study: Study, space: Sampled, *, turn: int) -> None:
        self.study = study
        self._space = _Packable(space)
        self._turn = turn
        self._waiting: dict[Executor, deque[Asked]] = {"packed": deque(), "dedicated": deque()}
        self._is_exhausted = False
        self.num_resumed = 0
        self.refill()

    def refill(self) -> None:
        """Puts the trials that nobody runs any more back in line."""
        for queue in self._waiting.values():
            queue.clear()
        for asked in self.study.unfinished(self._space):
            self._waiting[executor_of(asked.recipe)].append(asked)
        self.num_resumed = sum(len(queue) for queue in self._waiting.values())

    def turn_of(self) -> Executor | None:
        """Returns the executor whose turn it is, or None where nothing is left to do."""
        if not any(self._waiting.values()) and (asked := self._ask()) is not None:
            self._waiting[executor_of(asked.recipe)].append(asked)
        longest = max(self._waiting, key=lambda executor: len(self._waiting[executor]))
        return longest if self._waiting[longest] else None

    def next(self, executor: Executor) -> Asked | None:
        """Returns the next trial for an executor, or None where its turn is over."""
        if self._waiting[executor]:
            return self._waiting[executor].popleft()
        other: Executor = "packed" if executor == "dedicated" else "dedicated"
        while len(self._waiting[other]) < self._turn:
            asked = self._ask()
            if asked is None:
                return None
            if executor_of(asked.recipe) == executor:
                return asked
            self._waiting[other].append(asked)
        return None

    def _ask(self) -> Asked | None:
        if self._is_exhausted or self.study.num_remaining <= 0:
            return None
        asked = self.study.ask(self._space)
        self._is_exhausted = asked is None
        return asked


class StudySearcher(Searcher):
    """Tune's view of the study: asks for trials, tells what became of them.

    Args:
        queue: Gives the trials.
        executor: Whose trials.
        on_lost: Asked when a trial ended without a reason of its own; says whether its runner is
            lost, in which case the trial is not told anything and will be run again.
    """

    def __init__(
        self,
        queue: TrialQueue,
        executor: Executor,
        on_lost: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__()
        self._queue = queue
        self.executor = executor
        self._on_lost = on_lost
        self._trials: dict[str, Asked] = {}
        self.is_lost = False

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Gives Tune the next trial's number; its recipe is in its folder."""
        asked = None if self.is_lost else self._queue.next(self.executor)
        if asked is None:
            return str(Searcher.FINISHED)
        study = self._queue.study
        folder = study.trial_folder(asked.number)
        write_json(folder / RECIPE_FILE, asked.recipe.model_dump(mode="json"))
        study.note(asked.number, executor=self.executor)
        forget_failure(folder)
        self._trials[trial_id] = asked
        for report in read_reports(folder):
            self._report(asked.number, report)
        return {
            "trial": asked.number,
            "folder": str(folder),
            "steps": asked.recipe.train.steps,
            "stop_at_loss": asked.recipe.train.stop_at_loss,
            "params": asked.params,
        }

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Records a report."""
        self._report(self._trials[trial_id].number, result)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tells the study the truth: complete, stopped, failed, or nothing at all.

        A trial that was interrupted from outside is told nothing; it is still running and will be
        taken up by the next driver.
        """
        asked = self._trials.pop(trial_id, None)
        if asked is None:
            return
        study, number = self._queue.study, asked.number
        if error:
            reason = failure_of(study.trial_folder(number))
            if reason is None and self._on_lost():
                self.is_lost = True
                return
            study.tell(number, "failed", reason=reason or "its runner ended without a word")
            return
        if result is not None and STEP in result:
            self._report(number, result)
        trial = study.trial(number)
        if asked.recipe.train.ends_with({**trial.metrics, STEP: trial.steps}):
            study.tell(number, "complete")
        elif result is not None and STEP in result:
            study.tell(number, "stopped")

    def _report(self, number: int, result: Mapping[str, Any]) -> None:
        metrics = metrics_of(result)
        self._queue.study.report(number, int(result[STEP]), metrics)
        self._queue.study.note(number, seconds=float(result["seconds"]))

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


def metrics_of(result: Mapping[str, Any]) -> dict[str, float]:
    """Picks the metrics out of a Tune result."""
    return {
        name: float(value)
        for name, value in result.items()
        if name.startswith(_MEASURED) and isinstance(value, int | float)
    }
