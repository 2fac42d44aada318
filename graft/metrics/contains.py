"""Share of the wanted texts that stand somewhere in the answer."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from graft.core.model import Listed
from graft.metrics._answers import score_answers
from graft.metrics.base import METRICS, Metric, RowOutcome


@METRICS.register
class ContainsMetric(Metric):
    """Share of the given texts that the answer contains; without any, of the reference itself.

    For answers that may say more than what was asked. It cannot see contradictions: an answer that
    names everything contains everything.

    Reference:
        Lost in the Middle: How Language Models Use Long Contexts, arXiv 2307.03172, section 2.
    """

    type: Literal["contains"] = "contains"
    texts: Listed[Annotated[str, Field(min_length=1)]] = ()
    """What must stand in every answer; empty: the row's reference."""
    ignore_case: bool = False
    """Upper and lower case count as the same."""

    needs: ClassVar[Literal["loss", "generation"]] = "generation"
    mode: ClassVar[Literal["min", "max"]] = "max"

    def refusal(self, reference: str) -> str | None:
        """Asks for texts, the row's or its own."""
        if self.texts or reference.strip():
            return None
        return "the row has no wanted answer, and every answer contains nothing; give `texts`"

    def score(self, rows: list[RowOutcome]) -> tuple[float, list[float]]:
        """Returns the mean share, and each row's own, 0 to 1."""
        return score_answers(self, rows, self._score_one)

    def _score_one(self, reference: str, answer: str) -> float:
        wanted = self.texts or (reference.strip(),)
        if self.ignore_case:
            wanted, answer = tuple(map(str.casefold, wanted)), answer.casefold()
        return sum(text in answer for text in wanted) / len(wanted)
