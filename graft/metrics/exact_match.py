"""Share of answers that are exactly what was wanted."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, ClassVar, Literal

from graft.metrics._answers import parse_json, score_answers
from graft.metrics.base import METRICS, Metric, RowOutcome


@METRICS.register
class ExactMatchMetric(Metric):
    """1 where the greedy answer equals the reference, else 0.

    Where the reference is JSON, both are parsed and compared as values: spaces and the order of
    keys do not count, `1` equals `1.0`, and an answer that is not JSON, or repeats a key, is wrong.
    Other references are compared as text without the space around it.

    Reference:
        SQuAD: 100,000+ Questions for Machine Comprehension of Text, arXiv 1606.05250.
    """

    type: Literal["exact_match"] = "exact_match"
    compare: Literal["auto", "json", "text"] = "auto"
    """`auto`: as JSON where the reference parses as JSON. `json`: such a reference is required."""
    ignore_case: bool = False
    """Upper and lower case count as the same in text comparisons."""

    needs: ClassVar[Literal["loss", "generation"]] = "generation"
    mode: ClassVar[Literal["min", "max"]] = "max"

    def refusal(self, reference: str) -> str | None:
        """Asks for a wanted answer, in JSON where `compare` says so."""
        if not reference:
            return "the row has no wanted answer to compare with"
        if self.compare == "json" and (problem := _problem(reference)) is not None:
            return (
                f"the reference {reference[:80]!r} is not JSON ({problem}); correct the row or use "
                "compare: auto"
            )
        return None

    def score(self, rows: list[RowOutcome]) -> tuple[float, list[float]]:
        """Returns the share of matches, and 1 or 0 a row."""
        return score_answers(
            self,
            rows,
            lambda reference, answer: _matches(reference, answer, self.compare, self.ignore_case),
        )


@lru_cache(maxsize=65536)
def _problem(reference: str) -> str | None:
    try:
        parse_json(reference)
    except (ValueError, RecursionError) as error:
        return str(error)
    return None


@lru_cache(maxsize=65536)
def _matches(reference: str, answer: str, compare: str, ignore_case: bool) -> bool:
    if compare != "text":
        try:
            wanted = parse_json(reference)
        except (ValueError, RecursionError):
            pass
        else:
            try:
                return bool(_canonical(parse_json(answer)) == _canonical(wanted))
            except (ValueError, RecursionError):
                return False
    left, right = reference.strip(), answer.strip()
    return left.casefold() == right.casefold() if ignore_case else left == right


def _canonical(value: Any) -> Any:
    """A form in which equal JSON values are equal Python values: `true` is not `1`."""
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    return ("bool", value) if isinstance(value, bool) else value
