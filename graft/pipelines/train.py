"""`train`: one complete recipe, trained here or on workers, measured and published."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from graft.artifacts.record import MetricValue
from graft.core.errors import TrainingError
from graft.core.files import require_writable, write_atomic
from graft.core.model import StrictModel
from graft.core.progress import QUIET, Progress, Task
from graft.core.signals import told_to_end

if TYPE_CHECKING:
    from graft.artifacts import Store
    from graft.engine.multi import AdapterTensors
    from graft.engine.run import LoadedRun, PreparedRun, TrainResult
    from graft.engine.train import StepReport
    from graft.recipe.sections import Recipe
    from graft.recipe.space import RecipeSpace

RESULT_FILE = "result.json"
_POLL_S = 0.5


class TrainedAdapter(StrictModel):
    """What one training came to."""

    name: str
    artifact: str
    """Digest of the published adapter."""
    version: int
    """Under the recipe's name; `graft adapters promote` makes it the champion."""
    metrics: dict[str, MetricValue]
    """Over all held-out rows."""
    folder: str
    """Holds the resolved recipe, `report.jsonl` and `checkpoint/`."""
    steps: int
    seconds: float
    """Of training, all attempts together."""
    loss: float
    """Of the last steps, a supervised token."""
    tokens_per_s: float
    data_digest: str


class TrainPlan(StrictModel):
    """What a training would do."""

    name: str
    folder: str
    steps: int
    steps_done: int
    """A checkpoint of so many steps is there."""
    workers: int
    backend: str


def plan_train(space: RecipeSpace, *, home: Path) -> TrainPlan:
    """Says what `train` would do; starts nothing and writes nothing.

    Raises:
        ConfigError: The recipe has holes.
    """
    from graft.engine.checkpoint import newest_checkpoint
    from graft.engine.run_folder import CHECKPOINTS

    recipe = space.recipe()
    folder = _folder(recipe, home)
    found = newest_checkpoint(folder / CHECKPOINTS)
    return TrainPlan(
        name=recipe.name,
        folder=str(folder),
        steps=recipe.train.steps,
        steps_done=found[0].step if found else 0,
        workers=recipe.scale.max_workers,
        backend="deepspeed" if recipe.scale.needs_deepspeed else "torch",
    )


def train(
    space: RecipeSpace,
    *,
    home: Path,
    progress: Progress = QUIET,
    address: str | None = None,
) -> TrainedAdapter:
    """Trains a complete recipe, or goes on where the same call was interrupted.

    One process trains here; several, ZeRO and offload go through Ray Train and DeepSpeed. A recipe
    that is finished is returned as it is.

    Args:
        space: A recipe without holes.
        home: Where runs, models and artifacts are kept; every node must see it.
        progress: Told of every step.
        address: Of a Ray cluster; None means `RAY_ADDRESS`, then a local one for this call.

    Raises:
        ConfigError: The recipe has holes, another one began the run of its name, or the cluster
            is too small.
        AdapterError: What the same recipe made before is damaged, or `train.init_from` is unusable.
        TrainingError: The loss is not finite, or workers were lost.
    """
    from graft.artifacts import Store
    from graft.engine.run import prepare_run, read_result, run_facts
    from graft.engine.run_folder import read_progress
    from graft.engine.trainable import require_trainable
    from graft.models import pick_device
    from graft.pipelines.room import require_room
    from graft.runtime.session import names_cluster

    recipe = space.recipe()
    folder, store = _folder(recipe, home), Store(home)
    require_writable(folder, "the run", keep=False)
    device = pick_device(recipe.model)  # this process publishes what workers train
    if not recipe.scale.needs_deepspeed:
        require_trainable(recipe, device)
    if not (recipe.scale.needs_deepspeed and names_cluster(address)):  # whose nodes are asked later
        require_room(recipe, home)
    prepared = prepare_run(recipe, home)
    known = _known(folder, prepared, store)
    if known is not None:
        progress.note(f"{recipe.name!r} is trained already; change its recipe or name for another")
        return known
    if recipe.scale.needs_deepspeed:
        _train_on_workers(recipe, folder, home=home, progress=progress, address=address)
        run = prepared.load()  # not before: this process's device may be a worker's too
    else:
        run = prepared.load()
        _train_here(run, folder, home=home, progress=progress)
    kept = read_progress(folder, run_facts(run))
    if kept is None:
        raise TrainingError(f"{folder} has no whole checkpoint; run the same command again")
    published = _publish(run, kept.state.tensors, read_result(folder), store, progress)
    write_atomic(folder / RESULT_FILE, published.model_dump_json())
    return published


def _publish(
    run: LoadedRun,
    tensors: AdapterTensors,
    result: TrainResult,
    store: Store,
    progress: Progress,
) -> TrainedAdapter:
    from graft.pipelines.finish import publish_trained

    stored = publish_trained(run, tensors, store=store, progress=progress)
    assert stored.digest is not None  # a published adapter has one
    return TrainedAdapter(
        name=run.recipe.name,
        artifact=stored.digest,
        version=store.register(run.recipe.name, stored.digest),
        metrics=stored.record.metrics,
        folder=result.folder,
        steps=result.steps,
        seconds=result.seconds,
        loss=result.metrics["train/loss"],
        tokens_per_s=result.metrics["train/tokens_per_s"],
        data_digest=run.prepared.proof.digest,
    )


def _folder(recipe: Recipe, home: Path) -> Path:
    return home / "runs" / recipe.name


def _known(folder: Path, run: PreparedRun, store: Store) -> TrainedAdapter | None:
    """Returns the result of the same recipe on the same base, start and data, if it is still there.

    Raises:
        AdapterError: It is there, and damaged.
    """
    from graft.engine.run_folder import RECIPE_FILE

    try:
        same = json.loads((folder / RECIPE_FILE).read_text()) == run.recipe.model_dump(mode="json")
        result = TrainedAdapter.model_validate_json((folder / RESULT_FILE).read_text())
    except (FileNotFoundError, ValidationError, ValueError):
        return None
    is_same = same and result.data_digest == run.prepared.proof.digest
    if not is_same or result.artifact not in store.digests():
        return None
    record = store.verify(result.artifact).record
    starts = [parent.digest for parent in record.parents if parent.relation == "successor"]
    same_start = starts == ([] if run.start is None else [run.start])
    same_base = record.base_digest == run.ready.digest
    same_template = record.template_digest in (None, run.ready.template_digest)
    return result if same_start and same_base and same_template else None


def _train_here(run: LoadedRun, folder: Path, *, home: Path, progress: Progress) -> None:
    import torch

    from graft.engine.run import SLOT, train_run

    if run.recipe.scale.threads is not None:
        torch.set_num_threads(run.recipe.scale.threads)
    with progress.task(f"training {run.recipe.name}", run.recipe.train.steps, "step") as task:
        done = 0

        def on_step(step: StepReport) -> None:
            nonlocal done
            speed = step.num_tokens / max(step.seconds, 1e-9)
            task.advance(step.step - done, loss=step.loss, **step.headline, **{"tokens/s": speed})
            done = step.step

        with told_to_end() as leaves:
            is_complete = train_run(run, folder, home=home, on_step=on_step, leaves=leaves)
    if not is_complete:
        raise TrainingError(
            f"{run.recipe.name!r} was told to end (SIGTERM); step {done} is kept, and the same "
            "command goes on from there"
        )
    # What is published is seated anew; a method that owns the base shares it with no slot.
    run.model.remove_slot(SLOT)


def _train_on_workers(
    recipe: Recipe, folder: Path, *, home: Path, progress: Progress, address: str | None
) -> None:
    """Waits for the workers in a way that Ctrl-C interrupts: Ray Train would swallow it."""
    from graft.pipelines.room import require_room
    from graft.runtime.nodes import await_node, find_limits
    from graft.runtime.session import ray_session
    from graft.runtime.train_workers import train_on_workers
    from graft.runtime.trials import take_words

    failures: list[Exception] = []

    def work(leaves: Callable[[], bool]) -> None:
        try:
            train_on_workers(recipe, home=home, folder=folder, leaves=leaves)
        except Exception as error:
            failures.append(error)

    with (
        ray_session(address) as session,
        progress.task(f"training {recipe.name}", recipe.train.steps, "step") as task,
        told_to_end() as leaves,
    ):
        if not session.is_local:
            session = await_node(recipe, session, progress)
            require_room(recipe, home, limits=find_limits(recipe, session))
        thread = threading.Thread(target=work, args=(leaves,), name="train-workers", daemon=True)
        thread.start()
        done = 0
        while thread.is_alive():
            thread.join(_POLL_S)
            done = _advance(task, folder, done)
            for words in take_words(folder):
                progress.note(words)
    if failures:
        raise failures[0]


def _advance(task: Task, folder: Path, done: int) -> int:
    """Moves the bar to the newest report; returns its step."""
    from graft.engine.run_folder import objective_figures, read_reports

    reports = read_reports(folder)
    if not reports or reports[-1]["steps"] == done:
        return done
    last = reports[-1]
    speed = last["train/tokens_per_s"]
    fields = {"loss": last["train/loss"], **objective_figures(last), "tokens/s": speed}
    task.advance(last["steps"] - done, **fields)
    return int(last["steps"])
