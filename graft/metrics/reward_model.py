"""What a reward model says of an answer."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from graft.core.errors import DataError
from graft.metrics.base import METRICS, Metric, RowOutcome


@METRICS.register
class RewardModelMetric(Metric):
    """The score that a model trained on preferences gives the answer, as it gives it.

    An adapter of `objective: reward` on the same base is a frozen slot beside the one in training:
    no second model. Any other sequence classifier with one output is a model of its own, which
    reads the conversation with its own chat template.

    Reference:
        Training language models to follow instructions with human feedback, arXiv 2203.02155,
        section 3.5.
    """

    type: Literal["reward_model"] = "reward_model"
    source: str = Field(min_length=1, examples=["judge"])
    """An adapter of `objective: reward` (name, digest or folder), or the folder of a classifier."""

    needs: ClassVar[Literal["loss", "generation", "preference"]] = "generation"
    mode: ClassVar[Literal["min", "max"]] = "max"

    def score(self, rows: list[RowOutcome]) -> tuple[float, list[float]]:
        """Returns the mean score, and each row's own."""
        if not rows:
            raise DataError("no held-out prompt, so there is no answer to score")
        found = [(row.model_scores or {}).get(self.source) for row in rows]
        scores = [score for score in found if score is not None]
        if len(scores) < len(rows):
            raise DataError(
                f"reward model {self.source!r} was not asked; name it in the recipe that is trained"
            )
        return sum(scores) / len(scores), scores
