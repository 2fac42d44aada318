"""The dedicated executor: a Tune trial is a Ray Train run of its own."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray.tune import Trainable

from graft.core.errors import DeviceMemoryError, GraftError, NoRoomError, TrainingError
from graft.core.progress import QUIET, Progress
from graft.runtime.seats import Seats
from graft.runtime.trials import (
    Asked,
    Loss,
    fail_trial,
    failure_of,
    is_asked_to_leave,
    lose_trial,
    loss_words,
)

if TYPE_CHECKING:
    from graft.engine.memory.cap import MemoryCap
    from graft.recipe.sections import Recipe
    from graft.runtime.shared_rows import SharedRows
    from graft.runtime.study import Study

_LOOK_EVERY_S = 0.2


class DedicatedTrial(Trainable):
    """Trains one trial on its own workers and passes their reports on.

    A class, for Tune ends a function without a word: the workers of a trial that it stops would
    keep their places. These are told to leave.

    The config has the trial's `folder`, which holds its recipe and will hold its state, `home`,
    `threads`, the share of a worker in the cluster's cores while others train beside it, and
    `needed_bytes`, the memory that a worker is predicted to take of its device.
    """

    def setup(self, config: dict[str, Any], rows: SharedRows | None = None) -> None:
        """Starts the run, in a thread."""
        from graft.engine.checkpoint import newest_step
        from graft.engine.run_folder import CHECKPOINTS, RECIPE_FILE
        from graft.recipe.sections import Recipe

        self._folder, self._home = Path(config["folder"]), Path(config["home"])
        recipe = Recipe.model_validate_json((self._folder / RECIPE_FILE).read_text())
        if recipe.scale.threads is None:
            scale = recipe.scale.model_copy(update={"threads": config["threads"]})
            recipe = recipe.model_copy(update={"scale": scale})
        self._recipe, self._rows = recipe, rows
        self._needed_bytes = int(config.get("needed_bytes", 0))
        self._steps = newest_step(self._folder / CHECKPOINTS)
        self._error: Exception | None = None
        self._leaves = threading.Event()
        self._thread = threading.Thread(target=self._train, args=(recipe,), name="run", daemon=True)
        self._thread.start()

    def step(self) -> dict[str, Any]:
        """Waits for the next report.

        Raises:
            GraftError: What the workers raised; its message is left in the folder for the driver.
            TrainingError: A person stopped the trial.
        """
        from graft.engine.run_folder import read_reports

        while (report := self._next_report()) is None and self._thread.is_alive():
            if is_asked_to_leave(self._folder):
                self._leaves.set()
            self._thread.join(_LOOK_EVERY_S)
        if report is None:
            self._await_end()
            if self._leaves.is_set():
                raise TrainingError("the run left as it was asked to")
            # The last one came while the run ended, or before this trial was taken up again.
            report = read_reports(self._folder)[-1]
        is_done = self._recipe.train.ends_with(report)
        if is_done:
            self._await_end()
        self._steps = int(report["steps"])
        return {**report, "done": is_done}

    def cleanup(self) -> None:
        """Lets the workers leave after the step they are at, and waits until they have."""
        self._leaves.set()
        self._thread.join()

    def _await_end(self) -> None:
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _next_report(self) -> dict[str, Any] | None:
        from graft.engine.run_folder import read_reports

        reports = read_reports(self._folder)
        return next((dict(r) for r in reports if r["steps"] > self._steps), None)

    def _train(self, recipe: Recipe) -> None:
        from graft.runtime.train_workers import train_on_workers

        try:
            train_on_workers(
                recipe,
                home=self._home,
                folder=self._folder,
                eval_rows=recipe.search.eval_rows,
                leaves=self._leaves.is_set,
                needed_bytes=self._needed_bytes,
                rows=self._rows,
            )
        except Exception as error:
            self._error = error
            if not self._leaves.is_set():
                self._tell(error)

    def _tell(self, error: Exception) -> None:
        if isinstance(error, NoRoomError):
            lose_trial(self._folder, str(error))
        elif failure_of(self._folder) is None:  # else a worker has left its own, with a measurement
            words = str(error) if isinstance(error, GraftError) else repr(error)
            is_killed = isinstance(error, DeviceMemoryError)
            fail_trial(self._folder, words, needed_bytes=0 if is_killed else None)


class DedicatedSeats(Seats):
    """The workers of trials that each have their own.

    One that finds no room is not to blame, nor one whose process dies, for it only waits: it is
    run again in another turn, from its newest checkpoint.

    Args:
        study: Whose trials.
        memory: Predicts what a worker takes.
        progress: Told of losses.
    """

    def __init__(self, study: Study, memory: MemoryCap, progress: Progress = QUIET) -> None:
        self._study = study
        self._memory = memory
        self._progress = progress

    def take(self, asked: Asked, folder: Path) -> dict[str, Any]:
        """Tells a trial what is to be free before a worker of it loads."""
        return {"needed_bytes": self._memory.beside_process(asked.recipe)}

    def loss_of(self, number: int) -> Loss:
        """Says what a trial did not find, or that its process is gone."""
        words = loss_words(self._study.trial_folder(number)) or "its process died"
        self._progress.note(f"trial {number} cannot go on now, and is taken up again: {words}")
        return Loss(words)
