"""Rewards: metrics of generated answers, weighted and summed, one number a sampled answer.

A reward is trained on, so nothing doubtful passes: a metric that raises, gives a wrong number of
scores or one that is no finite number ends the step, and the message names the metric and the row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Annotated, Any, NamedTuple

from pydantic import Field, field_validator

from graft.core.errors import DataError, TrainingError
from graft.core.model import StrictModel
from graft.metrics.base import METRICS, Metric, RowOutcome


class Reward(StrictModel):
    """A metric and what it counts: `{metric: exact_match, weight: 2}`."""

    metric: Annotated[Metric, *METRICS.field()]
    """Any metric of generated answers, with its settings."""
    weight: float = Field(1.0, allow_inf_nan=False)
    """Factor on its scores; below 0 the metric is a penalty, at 0 it is only reported."""

    @field_validator("metric")
    @classmethod
    def metric_scores_answers(cls, metric: Metric) -> Metric:
        """Refuses a metric of the loss: a sampled answer has none to be paid for."""
        if metric.needs != "generation":
            able = [name for name in METRICS.names() if METRICS.get(name).needs == "generation"]
            raise ValueError(
                f"metric {metric.type!r} measures the {metric.needs} of held-out rows, and a "
                f"reward scores sampled answers; choose of {', '.join(able)}"
            )
        return metric


class RewardScores(NamedTuple):
    """What a batch of answers earned."""

    totals: list[float]
    """Weighted sum of each row."""
    by_reward: dict[str, list[float]]
    """Each metric's own scores, without the weight, under the name that `reward_names` gives."""


def reward_names(rewards: Sequence[Reward]) -> list[str]:
    """Names each reward by its metric's type; a second `regex` is called `regex_2`."""
    kinds = [reward.metric.type for reward in rewards]
    counts = [kinds[: index + 1].count(kind) for index, kind in enumerate(kinds)]
    return [
        kind if count == 1 else f"{kind}_{count}" for kind, count in zip(kinds, counts, strict=True)
    ]


def score_rewards(
    rewards: Sequence[Reward], rows: list[RowOutcome], sources: Sequence[str]
) -> RewardScores:
    """Scores sampled answers.

    Args:
        rewards: At least one.
        rows: Reference and answer of each sample; at least one.
        sources: Where each row comes from, `train.jsonl:7`; for messages.

    Raises:
        DataError: A metric refuses a row.
        TrainingError: A metric raises, or its scores are not one finite number a row.
    """
    by_reward = {
        name: _checked_scores(reward.metric, rows, sources)
        for name, reward in zip(reward_names(rewards), rewards, strict=True)
    }
    return add_up(rewards, by_reward)


def add_up(rewards: Sequence[Reward], by_reward: dict[str, list[float]]) -> RewardScores:
    """Weighs what each reward gave."""
    weights = [reward.weight for reward in rewards]
    totals = [
        sum(weight * score for weight, score in zip(weights, of_row, strict=True))
        for of_row in zip(*by_reward.values(), strict=True)
    ]
    return RewardScores(totals, by_reward)


def _checked_scores(metric: Metric, rows: list[RowOutcome], sources: Sequence[str]) -> list[float]:
    try:
        given: Any = metric.score(rows)
    except (Exception, SystemExit) as error:  # anybody's code: it raises what it likes
        raise _refusal(metric, error, rows, sources) from error
    try:
        _, each = given
        scores: list[Any] = list(each)
    except (TypeError, ValueError) as error:
        raise TrainingError(
            f"reward {metric.type!r} gave {str(given)[:60]} for {len(rows)} answers "
            f"({sources[0]} to {sources[-1]}); a metric gives a mean and a list of one score a row"
        ) from error
    if len(scores) != len(rows):
        raise TrainingError(
            f"reward {metric.type!r} gave {len(scores)} scores for {len(rows)} answers "
            f"({sources[0]} to {sources[-1]}); a metric gives one score a row"
        )
    for source, row, score in zip(sources, rows, scores, strict=True):
        if not isinstance(score, Real) or not math.isfinite(score):
            raise TrainingError(
                f"reward {metric.type!r} gave {score!r} for the answer {_shown(row)} to {source}; "
                "a score is one finite number"
            )
    return [float(score) for score in scores]


def _refusal(
    metric: Metric, error: BaseException, rows: list[RowOutcome], sources: Sequence[str]
) -> DataError | TrainingError:
    """Finds the row that a metric raised on by scoring each alone, and says so."""
    place = f"{len(rows)} answers together ({sources[0]} to {sources[-1]})"
    for source, row in zip(sources, rows, strict=True):
        try:
            metric.score([row])
        except (Exception, SystemExit) as own:  # the same code as above
            error, place = own, f"the answer {_shown(row)} to {source}"
            break
    kind = DataError if isinstance(error, DataError) else TrainingError
    words = str(error) if kind is DataError else f"{type(error).__name__}: {error}"
    return kind(f"reward {metric.type!r} cannot score {place}: {words}")


def _shown(row: RowOutcome) -> str:
    answer = row.answer or ""
    return repr(answer if len(answer) <= 60 else answer[:57] + "...")
