"""What training a search's best trials again has shown: plain records."""

from __future__ import annotations

from typing import Any, Literal

from graft.core.model import Listed, StrictModel


class RerunFacts(StrictModel):
    """One training of a finalist."""

    seed: int
    number: int | None = None
    """In the study of the re-runs; None where it has not begun."""
    state: Literal[
        "waiting", "running", "paused", "complete", "stopped", "failed", "infeasible"
    ] = "waiting"
    value: float | None = None
    """Of the searched metric; None where it is not complete."""
    reason: str | None = None
    """Why it failed or could not be."""


class FinalistFacts(StrictModel):
    """A trial of the search, and how its settings do on fresh seeds."""

    number: int
    """In the search."""
    params: dict[str, Any]
    searched: float
    """What the search measured: the figure that it was chosen by."""
    reruns: Listed[RerunFacts]
    """By seed."""
    mean: float | None = None
    """Over the complete re-runs."""
    low: float | None = None
    """Lower end of the interval of the mean; None for fewer than two complete re-runs."""
    high: float | None = None

    @property
    def values(self) -> list[float]:
        """Of the complete re-runs."""
        return [rerun.value for rerun in self.reruns if rerun.value is not None]

    @property
    def num_missing(self) -> int:
        """Re-runs that are not complete."""
        return len(self.reruns) - len(self.values)

    def overlaps(self, other: FinalistFacts) -> bool:
        """Tells whether the intervals meet; one that is not known meets none."""
        if self.low is None or self.high is None or other.low is None or other.high is None:
            return False
        return self.low <= other.high and other.low <= self.high


class Finals(StrictModel):
    """The finalists of a search, all trained on the same fresh seeds."""

    metric: str
    """The first that was searched for, on the rows of the search (`search.eval_rows`)."""
    mode: Literal["min", "max"]
    seeds: Listed[int]
    interval: Literal["student_t"] = "student_t"
    """Of the mean over seeds: what another seed changes, rows of the data being the same."""
    confidence: float
    finalists: Listed[FinalistFacts]
    """Best first: those whose re-runs are all complete, by their means, before the others."""
    published_seed: int | None = None
    """Whose run of the first finalist is published; None where that is not decided."""
    verdict: str
    """Whether the first is told apart from the others, in words."""
