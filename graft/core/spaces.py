"""Neutral records of what may vary: what a recipe's holes become."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from graft.core.model import Listed, StrictModel


class Choice(StrictModel):
    """One of several values, or of several whole sections."""

    kind: Literal["choice"] = "choice"
    values: Listed[Any]


class Float(StrictModel):
    """A real number in `[low, high]`, uniform or, with `log`, uniform in its logarithm."""

    kind: Literal["float"] = "float"
    low: float
    high: float
    log: bool = False

    @model_validator(mode="after")
    def low_below_high(self) -> Float:
        """Refuses empty ranges and logarithms of what is not positive."""
        _require_room(self.low, self.high)
        if self.log and self.low <= 0:
            raise ValueError(f"a log range must start above 0, not at {self.low}")
        return self


class Int(StrictModel):
    """A whole number in `[low, high]`, both ends included."""

    kind: Literal["int"] = "int"
    low: int
    high: int

    @model_validator(mode="after")
    def low_below_high(self) -> Int:
        """Refuses empty ranges."""
        _require_room(self.low, self.high)
        return self


def _require_room(low: float, high: float) -> None:
    if low == high:
        raise ValueError(f"a range from {low} to {high} is none; write {low} itself")
    if not low < high:
        raise ValueError(f"low {low} must be below high {high}")


Space = Choice | Float | Int
