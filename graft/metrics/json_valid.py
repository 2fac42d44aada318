"""Share of answers that are JSON, of the kind and with the keys that were asked for."""

from __future__ import annotations

from functools import lru_cache
from typing import ClassVar, Literal

from pydantic import model_validator

from graft.core.model import Listed
from graft.metrics._answers import parse_json, score_answers
from graft.metrics.base import METRICS, Metric, RowOutcome


@METRICS.register
class JsonValidMetric(Metric):
    """1 where the whole answer parses as JSON, else 0.

    As a reward beside `exact_match` it pays for the form before the content is right. What it
    cannot see is the content: alone, any JSON text earns it.

    Reference:
        The JavaScript Object Notation (JSON) Data Interchange Format, RFC 8259.
    """

    type: Literal["json_valid"] = "json_valid"
    kind: Literal["any", "object", "array"] = "any"
    """What the JSON must be; `any` takes bare numbers and strings too."""
    keys: Listed[str] = ()
    """Keys that the object must have; more are allowed."""

    needs: ClassVar[Literal["loss", "generation"]] = "generation"
    mode: ClassVar[Literal["min", "max"]] = "max"

    @model_validator(mode="after")
    def keys_are_of_an_object(self) -> JsonValidMetric:
        """Refuses keys of an array."""
        if self.keys and self.kind == "array":
            raise ValueError("an array has no keys; drop `keys` or ask for `kind: object`")
        return self

    def score(self, rows: list[RowOutcome]) -> tuple[float, list[float]]:
        """Returns the share of valid answers, and 1 or 0 a row."""
        return score_answers(self, rows, lambda _, answer: _is_valid(answer, self.kind, self.keys))


@lru_cache(maxsize=65536)
def _is_valid(answer: str, kind: str, keys: tuple[str, ...]) -> bool:
    try:
        value = parse_json(answer)
    except (ValueError, RecursionError):
        return False
    if kind == "array":
        return isinstance(value, list)
    if kind == "object" or keys:
        return isinstance(value, dict) and all(key in value for key in keys)
    return True
