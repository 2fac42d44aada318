"""A training run on several Ray Train workers, stepped by DeepSpeed.

The driver (a Tune trial, or the `train` pipeline) calls `train_on_workers`; Ray Train starts the
workers, each of which loads the base and runs the same loop over its share of every step's rows.
All state is in the run's folder, in our own format: Ray's storage is not read back.

Ray Train is given a fixed number of workers each time, and this module chooses it: Ray's own
elastic policy learns of a lost node up to 20 s late, waits without end below its minimum and ends
workers in the middle of a step. Here workers leave after a step, with a checkpoint of it, when a
node of theirs is being taken away or there is room for more of them.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from graft.core.errors import DeviceMemoryError, GraftError, TrainingError
from graft.engine.checkpoint import newest_step
from graft.engine.run import TrainResult, read_result
from graft.engine.run_folder import CHECKPOINTS
from graft.recipe.sections import Recipe
from graft.runtime.memory import KILLED
from graft.runtime.nodes import prepare_ops, require_disks
from graft.runtime.placement import (
    Places,
    WorkerNeeds,
    find_room,
    worker_needs,
    worker_resources,
)
from graft.runtime.trials import say_of_run
from graft.runtime.worker import LEAVE_FILE, WorkerConfig, work

if TYPE_CHECKING:
    from ray.train import TrainingFailedError, UserCallback

    from graft.runtime.shared_rows import SharedRows

_MAX_VAIN_RESTARTS = 2
_START_TIMEOUT_S = 180
_WATCH_EVERY_S = 1.0
_NO_ROOM = ("WorkerGroupStartupTimeoutError", "WorkerGroupStartupFailedError")

_log = logging.getLogger(__name__)


class LostWorkersError(TrainingError):
    """Workers died without an error of their own: killed, out of memory, or their node is gone."""


def train_on_workers(
    recipe: Recipe,
    *,
    home: Path,
    folder: Path,
    eval_rows: int = 0,
    callbacks: Sequence[UserCallback] = (),
    leaves: Callable[[], bool] = lambda: False,
    grow_after_s: float = 60.0,
    needed_bytes: int = 0,
    rows: SharedRows | None = None,
) -> TrainResult:
    """Trains a recipe on `scale.workers` workers; goes on where the folder's newest checkpoint is.

    A Ray session must exist. Reports are in the folder, and every worker gives the same one to
    `ray.train.report` too; words for people are there for `take_words`. Lost workers are replaced,
    from the checkpoint; after two losses in a row without a new checkpoint no more.

    Args:
        recipe: Complete.
        home: Seen by every node.
        folder: The run's own, seen by every node.
        eval_rows: Held-out rows measured at each report; 0 measures none.
        callbacks: Of Ray Train; they run in its controller.
        leaves: Whether the run is to end after the step it is at, to be continued another time.
        grow_after_s: Elastic workers become more at the earliest so long after they started.
        needed_bytes: That a worker is predicted to take of its device, which is to be free before
            it loads; 0 looks at GPUs only, and warns.
        rows: That somebody has prepared; None, or others than the recipe's, and workers do it.

    Raises:
        ConfigError: The cluster is too small for `scale.workers`, or a disk for what is swapped.
        GraftError: What a worker raised, with the worker's own message.
        NoRoomError: Workers found no room on the cluster, or no memory on their device.
        TrainingError: Workers died again and again, or the run has left.
    """
    needs = worker_needs(recipe)
    config = WorkerConfig(
        recipe=recipe.model_dump_json(),
        home=str(home),
        folder=str(folder),
        eval_rows=eval_rows,
        working_folder=os.getcwd(),
        needed_bytes=needed_bytes,
        rows=dict(rows or {}),
    )
    say = partial(say_of_run, folder)

    def raise_if_leaving() -> None:
        if leaves():
            raise TrainingError(
                f"{recipe.name!r} was told to end; step {newest_step(folder / CHECKPOINTS)} is "
                "kept, and the same command goes on from there"
            )

    num_vain = 0
    while True:
        step = newest_step(folder / CHECKPOINTS)
        try:
            count = find_room(needs, ask=raise_if_leaving, say=say)
            raise_if_leaving()
            require_disks(recipe, home)  # of nodes that came meanwhile, too
            prepare_ops([recipe.scale], say)
            raise_if_leaving()
            with _Watch(folder, needs, count, leaves, grow_after_s):
                if _fit(count, needs.uses_gpu, config, list(callbacks)):
                    return read_result(folder)
        except LostWorkersError as error:
            num_vain = 0 if newest_step(folder / CHECKPOINTS) > step else num_vain + 1
            if num_vain > _MAX_VAIN_RESTARTS:
                raise LostWorkersError(
                    f"{error}; that was loss {num_vain} in a row without a new checkpoint"
                ) from error
            say(f"{error}; going on from step {newest_step(folder / CHECKPOINTS)}")
        raise_if_leaving()


class _Watch:
    """Tells the workers to leave once the run is to end, or there is room for more of them.

    It is a context manager around them. Room is asked for when they have made a checkpoint: before
    that their own places may be what is free.
    """

    def __init__(
        self,
        folder: Path,
        needs: WorkerNeeds,
        count: int,
        leaves: Callable[[], bool],
        grow_after_s: float,
    ) -> None:
        self._folder = folder
        self._needs = needs
        self._count = count
        self._leaves = leaves
        self._grow_after_s = grow_after_s
        self._places: Places | None = None
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch-workers", daemon=True)

    def __enter__(self) -> None:
        (self._folder / LEAVE_FILE).unlink(missing_ok=True)
        self._started_s = time.monotonic()
        self._step = newest_step(self._folder / CHECKPOINTS)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()
        if self._places is not None:
            self._places.free()
        (self._folder / LEAVE_FILE).unlink(missing_ok=True)

    def _look(self) -> None:
        while not self._is_over.wait(_WATCH_EVERY_S):
            try:
                if self._leaves() or self._has_more_room():
                    self._folder.mkdir(parents=True, exist_ok=True)
                    (self._folder / LEAVE_FILE).touch()
                    return
            except Exception as error:  # the cluster or the disk may answer the next time
                _log.warning("cannot tell now whether the workers are to leave: %s", error)

    def _has_more_room(self) -> bool:
        if self._places is not None:
            return self._places.num_placed() > 0
        more = self._needs.largest - self._count
        is_time = time.monotonic() - self._started_s > self._grow_after_s
        if more and is_time and newest_step(self._folder / CHECKPOINTS) > self._step:
            self._places = Places(self._needs.resources, more)
        return False


def _fit(count: int, uses_gpu: bool, config: WorkerConfig, callbacks: list[UserCallback]) -> bool:
    """Runs a fixed number of workers; returns whether the run is complete."""
    # Ray Train reads these when the run starts; a report would otherwise wait up to 2 s for a poll.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(_START_TIMEOUT_S))
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    trainer = TorchTrainer(
        work,
        train_loop_config=config.model_dump(),
        scaling_config=ScalingConfig(
            num_workers=count,
            use_gpu=uses_gpu,
            resources_per_worker=worker_resources(uses_gpu=uses_gpu),
        ),
        torch_config=TorchConfig(backend="nccl" if uses_gpu else "gloo"),
        run_config=RunConfig(
            name="ray",
            storage_path=config.folder,
            failure_config=FailureConfig(
                max_failures=0, controller_failure_limit=0, max_preemption_failures=0
            ),
            callbacks=callbacks,
        ),
    )
    try:
        return bool(trainer.fit().return_value)
    except TrainingFailedError as error:
        raise _in_words(error) from error


def _in_words(error: TrainingFailedError) -> GraftError:
    """Finds the worker that raised by itself: its neighbours only echo that it is gone."""
    from ray.exceptions import OutOfMemoryError
    from ray.train.v2.api.exceptions import PreemptionError

    if isinstance(error, PreemptionError):
        return LostWorkersError(f"a node was taken away: {error}")
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    causes = {rank: getattr(failure, "_base_exc", failure) for rank, failure in failures.items()}
    for cause in causes.values():
        if isinstance(cause, GraftError):
            return cause
    for rank, cause in causes.items():
        if isinstance(cause, OutOfMemoryError) or KILLED in str(cause):
            return DeviceMemoryError(f"worker {rank} was killed for lack of memory: {cause}")
    for rank, cause in causes.items():
        if not _tells_of_another(cause):
            return TrainingError(f"worker {rank}: {type(cause).__name__}: {cause}")
    for rank, cause in causes.items():
        first_line = str(cause).strip().partition("\n")[0]
        return LostWorkersError(f"worker {rank} was lost, or lost its neighbour: {first_line}")
    cause = getattr(error, "controller_failure", error)
    if type(cause).__name__ in _NO_ROOM:
        return LostWorkersError(f"the workers' places were taken meanwhile: {cause}")
    return TrainingError(f"the workers could not be started: {cause}")


def _tells_of_another(cause: Exception) -> bool:
    """Tells whether an error says only that some process is gone.

    Ray's and Ray Train's own classes do, and what torch raises when a connection breaks; gloo's
    errors have no class of their own.
    """
    from ray.exceptions import RayError
    from torch.distributed import DistError

    is_ray = isinstance(cause, RayError) or type(cause).__module__.startswith("ray.")
    return is_ray or isinstance(cause, DistError) or "/gloo/" in str(cause)
