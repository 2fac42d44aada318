"""How often the model itself prefers the answer that people preferred."""

from __future__ import annotations

from typing import ClassVar, Literal

from graft.core.errors import DataError
from graft.metrics.base import METRICS, Metric, RowOutcome


@METRICS.register
class PreferenceAccuracyMetric(Metric):
    """Share of held-out pairs whose chosen answer has the higher log-probability a token.

    Means over tokens, so that a short answer has no advantage. It needs no reference: objectives
    with and without one are compared by it, and so is the bare base.

    Reference:
        SimPO: Simple Preference Optimization with a Reference-Free Reward, arXiv 2405.14734
        (the length-normalised reward).
    """

    type: Literal["preference_accuracy"] = "preference_accuracy"

    needs: ClassVar[Literal["loss", "generation", "preference"]] = "preference"
    mode: ClassVar[Literal["min", "max"]] = "max"

    def score(self, rows: list[RowOutcome]) -> tuple[float, list[float]]:
        """Returns the share of pairs that are told apart rightly, and 1 or 0 a pair; a tie is 0."""
        if not rows:
            raise DataError("no held-out pair of answers, so there is no preference to measure")
        hits = [float((row.preference_margin or 0.0) > 0) for row in rows]
        return sum(hits) / len(hits), hits
