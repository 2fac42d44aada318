"""What a search may be for: names that reports will have, and costs with their one direction."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graft.core.registry import nearest
from graft.metrics.base import METRICS
from graft.recipe.costs import COSTS, LATENCY_MS, PREFIX

if TYPE_CHECKING:
    from graft.recipe.sections import Recipe

_TRAIN = ("train/loss", "train/lr", "train/grad_norm", "train/tokens_per_s")
_OF_TRIALS = ("method/", "objective/", "rollout/")
"""What a method or an objective tells of itself, known when it trains."""


def require_known_metrics(recipe: Recipe) -> None:
    """Refuses a searched metric that no report will have, as far as names tell, and such a gate.

    Raises:
        ValueError: With the nearest name and all known ones, or the settings that it needs.
    """
    parts = ["", *(f"{part.name}/" for part in recipe.parts if part.name and part.section.eval)]
    held_out = [f"eval/{part}{name}" for part in parts for name in METRICS.names()]
    wanted = [objective.metric for objective in recipe.search.objectives]
    for metric in wanted:
        if not metric.startswith(("eval/", PREFIX, *_OF_TRIALS)):
            _require_one_of("search.objectives", metric, [*_TRAIN, *held_out, *COSTS])
    listed = {metric.type for metric in recipe.eval.metrics}
    gated = ("loop.gate.metric", recipe.loop.gate.metric)
    for field, metric in (*(("search.objectives", metric) for metric in wanted), gated):
        if not metric.startswith("eval/"):
            continue
        _require_one_of(field, metric, held_out)
        name = metric.rpartition("/")[2]
        fields = METRICS.get(name).model_fields
        required = [key for key, known in fields.items() if known.is_required()]
        if required and name not in listed:
            raise ValueError(
                f"{field}: metric {metric!r} needs settings ({', '.join(required)}): list it with "
                "them in eval.metrics"
            )


def _require_one_of(field: str, metric: str, known: list[str]) -> None:
    if metric not in known:
        raise ValueError(
            f"{field}: unknown metric {metric!r}.{nearest(metric, known)} Known: {', '.join(known)}"
        )


def cost_obstacle(recipe: Recipe) -> str | None:
    """Says why the searched costs cannot be had of this recipe; None where they can."""
    searched = [objective.metric for objective in recipe.search.objectives]
    if all(metric in COSTS for metric in searched):
        return (
            f"search.objectives names costs alone ({', '.join(searched)}): the best would be the "
            "cheapest adapter, trained or not; name a quality beside them, as eval/loss"
        )
    if LATENCY_MS not in searched:
        return None
    if recipe.objective.scores_answers:
        return (
            f"objective {recipe.objective.type} trains a reward model, which gives no answers that "
            f"{LATENCY_MS} could time; leave it out"
        )
    if recipe.scale.zero_stage == 3:
        return (
            f"{LATENCY_MS} is of a base that is whole on one device, as it is served, and "
            "scale.zero_stage 3 divides it; use stage 0, 1 or 2, or leave that objective out"
        )
    return None
