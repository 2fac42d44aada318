"""Whether what is to be measured and rewarded can be, asked of the rows before anything trains."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from graft.core.errors import DataError
from graft.objectives.sampling import SamplingObjective

if TYPE_CHECKING:
    from graft.data.prepare import PreparedData
    from graft.data.records import EvalPrompt
    from graft.metrics.base import Metric
    from graft.recipe.sections import Recipe


def require_measurable(recipe: Recipe, prepared: PreparedData) -> None:
    """Refuses rows that a metric or a reward of the recipe could not score.

    Raises:
        DataError: The first such row, and what would do instead.
    """
    for part in recipe.parts:
        if isinstance(part.objective, SamplingObjective):
            asked = [r.asked for r in prepared.train if r.asked is not None and r.part == part.name]
            rewards = [reward.metric for reward in part.objective.rewards]
            _require_references(rewards, asked, "reward")
    metrics = recipe.eval.metrics
    _require_references([m for m in metrics if m.needs == "generation"], prepared.prompts, "metric")
    wanted = [row for row in prepared.eval if row.label != 0]
    needing = [metric.type for metric in metrics if metric.needs == "loss"]
    if needing and prepared.eval and not any(any(row.is_supervised) for row in wanted):
        raise DataError(
            f"{prepared.eval[0].source}: no held-out row has a wanted answer, and eval.metrics "
            f"{', '.join(needing)} measure its loss; give answers, or choose metrics of what is "
            "generated (length, regex, json_valid, reward_model)"
        )


def _require_references(metrics: Iterable[Metric], asked: list[EvalPrompt], kind: str) -> None:
    for metric in metrics:
        for prompt in asked:
            if reason := metric.refusal(prompt.reference):
                raise DataError(
                    f"{prompt.source}: {kind} {metric.type!r} cannot score it: {reason}"
                )
