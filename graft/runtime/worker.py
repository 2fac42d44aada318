"""What runs in each worker of a Ray Train run: the training loop, and when to leave it."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from graft.core.model import StrictModel
from graft.engine.memory.free import wait_until_free
from graft.engine.run import load_run, train_run
from graft.engine.run_folder import Report
from graft.engine.trainable import require_trainable
from graft.models import pick_device
from graft.recipe.sections import Recipe
from graft.runtime.memory import told_of_memory
from graft.runtime.shared_rows import shared_rows
from graft.runtime.trials import say_of_run

if TYPE_CHECKING:
    from graft.engine.backends.base import Backend

LEAVE_FILE = "workers-leave"
"""In a run's folder, the driver's word to the workers: end after this step.

The run may begin anew with more of them, unlike one that a person asks to leave."""

_ASK_EVERY_S = 2.0


class WorkerConfig(StrictModel):
    """What a worker is given."""

    recipe: str
    """JSON."""
    home: str
    folder: str
    eval_rows: int
    working_folder: str
    """The driver's, to which paths of the recipe relate."""
    needed_bytes: int = 0
    """Of a worker's device, predicted; 0 where nobody did."""
    rows: dict[str, Any] = Field(default_factory=dict)
    """`SharedRows`."""


def work(config: dict[str, Any]) -> bool:
    """Runs in every worker, with the fields of a `WorkerConfig`; returns whether it is complete."""
    import ray.train
    import torch

    # Ray Train moves workers into a folder of its own; a recipe's paths are the driver's.
    if Path(config["working_folder"]).is_dir():
        os.chdir(config["working_folder"])
    recipe = Recipe.model_validate_json(config["recipe"])
    context = ray.train.get_context()
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(recipe.scale.threads or max(1, cores // context.get_local_world_size()))
    if torch.cuda.is_available():
        from ray.train.torch import get_device

        torch.cuda.set_device(get_device())

    with told_of_memory(Path(config["folder"])):
        return _train(recipe, config)


def _train(recipe: Recipe, config: dict[str, Any]) -> bool:
    import ray.train

    from graft.engine.backends.deepspeed import DeepSpeedBackend
    from graft.engine.backends.torch import TorchBackend

    home, folder = Path(config["home"]), Path(config["folder"])
    require_trainable(recipe, pick_device(recipe.model))
    _prove_free(recipe, folder, config["needed_bytes"])
    run = load_run(recipe, home, shared_rows(config["rows"], recipe))

    def report(said: Report) -> None:
        ray.train.report(dict(said))

    backend: Backend = (
        DeepSpeedBackend(run.model, recipe.scale)
        if recipe.scale.needs_deepspeed
        else TorchBackend()
    )
    return train_run(
        run,
        folder,
        home=home,
        backend=backend,
        eval_rows=config["eval_rows"],
        on_report=report,
        leaves=_Leaving(folder, backend),
    )


def _prove_free(recipe: Recipe, folder: Path, needed_bytes: int) -> None:
    """Waits until there is memory for all workers; none of them loads before the last has looked.

    Raises:
        NoRoomError: Others go on holding it.
    """
    import ray.train
    import torch

    device = pick_device(recipe.model)
    if device.type == "cpu":  # whose memory the workers of a node share
        needed_bytes *= ray.train.get_context().get_local_world_size()
    wait_until_free(device, needed_bytes, say=partial(say_of_run, folder))
    if device.type == "cpu" and needed_bytes:
        torch.distributed.barrier()


class _Leaving:
    """Whether all workers leave after this step; each of them asks after every step.

    They do when the driver's file is there, and when a node of theirs is about to be taken away.
    The first is looked for, and the second asked of Ray, only every few seconds, by all at once.
    """

    def __init__(self, folder: Path, backend: Backend) -> None:
        self._file = folder / LEAVE_FILE
        self._backend = backend
        self._asked_s = time.monotonic()

    def __call__(self) -> bool:
        if not self._any(time.monotonic() - self._asked_s > _ASK_EVERY_S):
            return False
        import ray.train

        self._asked_s = time.monotonic()
        is_first = self._backend.world_rank == 0
        if self._any(is_first and self._file.exists()):
            return True
        return ray.train.get_preemption_info() is not None

    def _any(self, is_so: bool) -> bool:
        """Tells whether any worker says yes; all get the same answer."""
        import torch

        return bool(self._backend.all_reduce_sum(torch.tensor(float(is_so))) > 0)
