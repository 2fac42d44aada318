"""What a metric is: a score for each held-out row, averaged by the engine with an interval."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from graft.core.model import Variant
from graft.core.registry import Registry

if TYPE_CHECKING:
    import numpy as np


class RowOutcome(NamedTuple):
    """What the engine knows of one held-out row. Fields that were not needed are None."""

    reference: str
    """The wanted answer."""
    answer: str | None
    """The generated answer, greedy, without special tokens."""
    loss_sum: float | None
    """Summed negative log-likelihood of the supervised tokens, nats."""
    num_tokens: int | None
    """Supervised tokens."""
    preference_margin: float | None = None
    """Mean log-probability a token of the chosen answer, less that of the rejected one."""
    part: str = ""
    """Source of a mixture that it is from; empty where there is one source alone."""
    model_scores: Mapping[str, float] | None = None
    """What each reward model that was asked says of the answer, by its `source`."""


class Metric(Variant):
    """Base of all metrics; stateless. Reported as `eval/<type>`.

    One that needs generated answers is also a reward that sampling objectives train on.
    """

    needs: ClassVar[Literal["loss", "generation", "preference"]]
    mode: ClassVar[Literal["min", "max"]]

    @abstractmethod
    def score(self, rows: list[RowOutcome]) -> tuple[float, list[float]]:
        """Returns the metric over all rows, and each row's own share (for intervals)."""

    def pooled(self, scores_RN: np.ndarray, num_tokens_RN: np.ndarray) -> np.ndarray:
        """Returns the metric over N rows from their own shares, R times.

        Args:
            scores_RN: As `score` gives them.
            num_tokens_RN: Supervised tokens of each, where it is of a loss.
        """
        pooled_R: np.ndarray = scores_RN.mean(axis=-1)
        return pooled_R

    def refusal(self, reference: str) -> str | None:
        """Says why no answer to a row can be scored; by default every row's can.

        Asked of all rows before training, and by `score` again.

        Args:
            reference: The wanted answer; empty where the row has none.
        """
        return None


METRICS: Registry[Metric] = Registry("metric", "graft.metrics")
