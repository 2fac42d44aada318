"""Whether what is to be measured and rewarded can be, asked of the rows before anything trains."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from graft.core.errors import DataError
from graft.objectives.sampling import SamplingObjective
from graft.recipe.costs import LATENCY_MS

if TYPE_CHECKING:
    from graft.data.prepare import PreparedData
    from graft.data.records import EvalPrompt
    from graft.methods.base import Method
    from graft.metrics.base import Metric
    from graft.recipe.sections import Recipe


def require_measurable(
    recipe: Recipe,
    prepared: PreparedData,
    context_tokens: int,
    *,
    searched: Sequence[Metric] = (),
) -> None:
    """Refuses rows that a metric or a reward of the recipe could not score.

    Args:
        recipe: What is trained.
        prepared: Its rows.
        context_tokens: Tokens that the model can see at once.
        searched: Metrics that a search compares trials by, beside `eval.metrics`.

    Raises:
        DataError: The first such row, and what would do instead; or a prompt that leaves too little
            of the context for an answer.
    """
    for part in recipe.parts:
        if isinstance(part.objective, SamplingObjective):
            asked = [r.asked for r in prepared.train if r.asked is not None and r.part == part.name]
            rewards = [reward.metric for reward in part.objective.rewards]
            _require_references(rewards, asked, "reward")
            require_answers_fit(part.objective, recipe.method, asked, context_tokens)
    _require_held_out(recipe.eval.metrics, prepared, "eval.metrics")
    _require_held_out(searched, prepared, "search.objectives")
    if any(metric.needs == "generation" for metric in (*recipe.eval.metrics, *searched)):
        num_new = recipe.eval.max_new_tokens
        _require_room(prepared.prompts, num_new, "eval", recipe.method, context_tokens)
    names = [objective.metric for objective in recipe.search.objectives]
    if LATENCY_MS in names and not prepared.prompts:
        raise DataError(
            f"search.objectives {LATENCY_MS} times answers to held-out prompts, and data.eval has "
            "none; give rows with a prompt, or leave that objective out"
        )


def require_answers_fit(
    objective: SamplingObjective,
    method: Method,
    asked: Iterable[EvalPrompt],
    context_tokens: int,
) -> None:
    """Refuses prompts whose sampled answers could be longer than the context.

    Raises:
        DataError: The first such prompt, and what would do instead.
    """
    _require_room(asked, objective.max_new_tokens, "objective", method, context_tokens)


def _require_room(
    asked: Iterable[EvalPrompt], num_new: int, section: str, method: Method, context_tokens: int
) -> None:
    num_virtual = getattr(method, "num_virtual_tokens", 0)
    for prompt in asked:
        num_prompt = len(prompt.prompt_ids)
        if num_virtual + num_prompt + num_new > context_tokens:
            virtual = f", the adapter {num_virtual} virtual ones" if num_virtual else ""
            raise DataError(
                f"{prompt.source}: the prompt has {num_prompt} tokens{virtual}, an answer may "
                f"have {num_new} ({section}.max_new_tokens), and the model's context is "
                f"{context_tokens}; shorten or remove the row, or lower max_new_tokens"
            )


def _require_held_out(metrics: Sequence[Metric], prepared: PreparedData, field: str) -> None:
    _require_references([m for m in metrics if m.needs == "generation"], prepared.prompts, "metric")
    if not prepared.eval:
        return  # nothing is held out, so nothing is measured
    source = prepared.eval[0].source
    wanted = [row for row in prepared.eval if row.label != 0]
    needing = _names(metrics, "loss")
    if needing and not any(any(row.is_supervised) for row in wanted):
        raise DataError(
            f"{source}: no held-out row has a wanted answer, and {field} {needing} measure its "
            "loss; give answers, or choose metrics of what is generated (length, regex, "
            "json_valid, reward_model)"
        )
    needing = _names(metrics, "preference")
    if needing and not prepared.preferences:
        raise DataError(
            f"{source}: no held-out row is a pair of answers, and {field} {needing} compares the "
            "two of a pair; set data.eval to rows with `prompt`, `chosen` and `rejected`, or "
            "choose other metrics"
        )


def _names(metrics: Iterable[Metric], needs: str) -> str:
    return ", ".join(metric.type for metric in metrics if metric.needs == needs)


def _require_references(metrics: Iterable[Metric], asked: list[EvalPrompt], kind: str) -> None:
    for metric in metrics:
        for prompt in asked:
            if reason := metric.refusal(prompt.reference):
                raise DataError(
                    f"{prompt.source}: {kind} {metric.type!r} cannot score it: {reason}"
                )
