"""What metrics of generated answers share: a score a row and their mean, and strict JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from graft.core.errors import DataError
from graft.metrics.base import Metric, RowOutcome


def score_answers(
    metric: Metric, rows: list[RowOutcome], score: Callable[[str, str], float]
) -> tuple[float, list[float]]:
    """Returns the mean score, and each row's own.

    Args:
        metric: Whose score it is; it may refuse a row's reference.
        rows: Rows with answers.
        score: Called as `score(reference, answer)`.

    Raises:
        DataError: There is no row, or one cannot be scored.
    """
    if not rows:
        raise DataError("no held-out prompt, so there is no answer to compare")
    for reference in {row.reference for row in rows}:
        if reason := metric.refusal(reference):
            raise DataError(reason)
    scores = [float(score(row.reference, row.answer or "")) for row in rows]
    return sum(scores) / len(scores), scores


def parse_json(text: str) -> Any:
    """Parses JSON as its standard says: `NaN` and `Infinity` are none, no key stands twice.

    Raises:
        ValueError: It is not JSON.
        RecursionError: It is nested too deeply to tell.
    """
    return json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key stands twice")
    return values


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")
