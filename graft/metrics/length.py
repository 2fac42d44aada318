"""Whether answers are neither too short nor too long."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from graft.metrics._answers import score_answers
from graft.metrics.base import METRICS, Metric, RowOutcome


@METRICS.register
class LengthMetric(Metric):
    """1 where the answer's length is within bounds, falling linearly to 0 outside of them.

    A soft edge instead of a step: an answer that is a little too long learns which way to go.
    Characters are counted, without the space around the answer.

    Reference:
        DAPO, arXiv 2503.14476, section 3.4 (soft overlong punishment).
    """

    type: Literal["length"] = "length"
    min_chars: int = Field(1, ge=0)
    """Below, the score is the share of these that the answer has: an empty one earns 0."""
    max_chars: int | None = Field(None, ge=1)
    """Above, the score falls; None: as long as the row's reference."""
    falloff: float = Field(1.0, gt=0)
    """The score is 0 at `max_chars * (1 + falloff)`."""

    needs: ClassVar[Literal["loss", "generation"]] = "generation"
    mode: ClassVar[Literal["min", "max"]] = "max"

    @model_validator(mode="after")
    def bounds_are_in_order(self) -> LengthMetric:
        """Refuses a smallest length above the largest."""
        if self.max_chars is not None and self.max_chars < self.min_chars:
            raise ValueError(
                f"max_chars {self.max_chars} is below min_chars {self.min_chars}; no answer fits"
            )
        return self

    def refusal(self, reference: str) -> str | None:
        """Asks for a longest length, the row's or its own."""
        if self.max_chars is not None or reference.strip():
            return None
        return "the row has no wanted answer to be as long as; give `max_chars`"

    def score(self, rows: list[RowOutcome]) -> tuple[float, list[float]]:
        """Returns the mean score, and each row's own, 0 to 1."""
        return score_answers(self, rows, self._score_one)

    def _score_one(self, reference: str, answer: str) -> float:
        num_chars = len(answer.strip())
        if num_chars < self.min_chars:
            return num_chars / self.min_chars
        longest = self.max_chars or max(len(reference.strip()), self.min_chars)
        return max(0.0, 1.0 - max(0, num_chars - longest) / (self.falloff * longest))
