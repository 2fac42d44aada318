"""Share of answers that a regular expression matches."""

from __future__ import annotations

import re
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from graft.metrics._answers import score_answers
from graft.metrics.base import METRICS, Metric, RowOutcome


@METRICS.register
class RegexMetric(Metric):
    r"""1 where the pattern is found in the answer, else 0; the space around it does not count.

    Patterns are Python's `re`; a dot matches a line break only under `(?s)`. An expression that
    repeats a repetition, `(a+)+$`, can take minutes for one answer: keep it plain.

    Reference:
        Python's `re` module.
    """

    type: Literal["regex"] = "regex"
    pattern: str = Field(min_length=1, examples=[r"^\{.*\}$"])
    """What is looked for."""
    full_match: bool = False
    """The whole answer must match, not a part of it."""
    ignore_case: bool = False
    """Upper and lower case count as the same."""

    needs: ClassVar[Literal["loss", "generation"]] = "generation"
    mode: ClassVar[Literal["min", "max"]] = "max"

    @field_validator("pattern")
    @classmethod
    def pattern_compiles(cls, pattern: str) -> str:
        """Refuses what is no regular expression."""
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        return pattern

    def score(self, rows: list[RowOutcome]) -> tuple[float, list[float]]:
        """Returns the share of answers that match, and 1 or 0 a row."""
        compiled = re.compile(self.pattern, re.IGNORECASE if self.ignore_case else 0)
        find = compiled.fullmatch if self.full_match else compiled.search
        return score_answers(self, rows, lambda _, answer: find(answer.strip()) is not None)
