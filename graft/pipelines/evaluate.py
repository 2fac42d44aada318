"""`eval`: an adapter, or the bare base, measured on all held-out rows."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from graft.artifacts import MetricValue
from graft.core.errors import ConfigError
from graft.core.model import StrictModel
from graft.core.progress import QUIET, Progress

if TYPE_CHECKING:
    from graft.recipe.sections import Recipe

BASE = "base"


class EvalResult(StrictModel):
    """What was measured."""

    subject: str
    """Digest or folder of the adapter, or `base`."""
    data: str
    """The held-out rows."""
    metrics: dict[str, MetricValue]
    """Each with its interval."""
    scores: dict[str, tuple[float, ...]]
    """Metric → one score a row, in the data's order."""
    answers: tuple[str, ...]
    """Generated answers, where a metric needs them."""


def evaluate_reference(
    reference: str,
    recipe: Recipe | None = None,
    *,
    home: Path,
    progress: Progress = QUIET,
) -> EvalResult:
    """Measures the recipe's `eval.metrics` on its `data.eval`.

    Args:
        reference: A name, a digest, an adapter folder, or `base` for the bare base.
        recipe: Its model, data and eval sections are used; None is the adapter's own.
        home: Where adapters and models are.
        progress: Told of every row.

    Raises:
        ConfigError: The base is asked for without a recipe, or there are no held-out rows.
        AdapterError: The adapter is unknown, damaged, or of another base.
    """
    from graft.artifacts import Store
    from graft.compressors.folder import load_adapter
    from graft.engine.publish import require_base
    from graft.engine.run import evaluate_run, load_run
    from graft.pipelines.forms import form_name, recipe_of, seated

    stored = None
    if reference != BASE:
        stored = Store(home).resolve(reference, allow_folder=True)
        recipe = recipe or recipe_of(stored)
    if recipe is None:
        raise ConfigError("the bare base has no recipe of its own; name one with --recipe")
    if recipe.data.eval is None:
        raise ConfigError("data.eval is absent; name held-out rows, as in --set data.eval=FILE")
    run = load_run(recipe, home)
    with ExitStack() as stack:
        slot = None
        if stored is not None:
            require_base(stored, run.ready, run.recipe.model)
            (slot,) = stack.enter_context(seated(run, load_adapter(stored.path)))
        report = evaluate_run(run, slot, progress=progress)
    return EvalResult(
        subject=BASE if stored is None else form_name(stored),
        data=recipe.data.eval,
        metrics=report.metrics,
        scores=report.scores,
        answers=report.answers,
    )
