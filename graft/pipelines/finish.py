"""What every finished training comes to: measured on all held-out rows, and published."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graft.core.progress import QUIET, Progress

if TYPE_CHECKING:
    from graft.artifacts import MetricValue, Store, StoredAdapter
    from graft.engine.multi import AdapterTensors
    from graft.engine.run import LoadedRun

_SLOT = "finished"


def publish_trained(
    run: LoadedRun, tensors: AdapterTensors, *, store: Store, progress: Progress = QUIET
) -> StoredAdapter:
    """Evaluates trained weights on all held-out rows and publishes them with their record.

    Args:
        run: What they were trained on, loaded; its model is left as it was.
        tensors: Of the last checkpoint.
        store: Where to.
        progress: Told of every row.

    Raises:
        AdapterError: A weight is not finite.
        TrainingError: A metric is not finite.
    """
    from graft.artifacts import Parent
    from graft.compressors.base import Adapter
    from graft.engine.publish import finished_tensors, publish_adapter
    from graft.engine.run import evaluate_run

    recipe = run.recipe
    tensors = finished_tensors(recipe, tensors)
    metrics: dict[str, MetricValue] = {}
    if run.prepared.eval:
        run.model.add_slot(_SLOT, recipe.method, tensors=tensors)
        try:
            metrics = evaluate_run(run, _SLOT, progress=progress).metrics
        finally:
            run.model.remove_slot(_SLOT)
    parents = [] if run.start is None else [Parent(digest=run.start, relation="successor")]
    return publish_adapter(
        store,
        Adapter(recipe.method, tensors),
        recipe=recipe,
        ready=run.ready,
        data_digest=run.prepared.proof.digest,
        metrics=metrics,
        parents=parents,
    )
