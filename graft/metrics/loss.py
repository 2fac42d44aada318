"""Mean negative log-likelihood of the wanted answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from graft.core.errors import DataError
from graft.metrics.base import METRICS, Metric, RowOutcome

if TYPE_CHECKING:
    import numpy as np


@METRICS.register
class LossMetric(Metric):
    """Cross-entropy a supervised token, in nats: what training minimises, on rows it has not seen.

    Every token counts alike, so that a long answer weighs more than a short one. Of a pair the
    chosen answer is read, and no answer that is labelled unwanted, whatever the objective.

    Reference:
        `loss` of transformers' causal language models, over the same tokens.
    """

    type: Literal["loss"] = "loss"

    needs: ClassVar[Literal["loss", "generation"]] = "loss"
    mode: ClassVar[Literal["min", "max"]] = "min"

    def score(self, rows: list[RowOutcome]) -> tuple[float, list[float]]:
        """Returns the loss over all tokens, and each row's own mean."""
        total, num_tokens = loss_totals(rows)
        return total / num_tokens, [row_mean(row) for row in rows]

    def pooled(self, scores_RN: np.ndarray, num_tokens_RN: np.ndarray) -> np.ndarray:
        """Weighs each row's mean by its tokens."""
        return token_mean(scores_RN, num_tokens_RN)


def loss_totals(rows: list[RowOutcome]) -> tuple[float, int]:
    """Sums loss and supervised tokens of all rows.

    Raises:
        DataError: No row has a supervised token.
    """
    num_tokens = sum(row.num_tokens or 0 for row in rows)
    if num_tokens == 0:
        raise DataError("no supervised token in the held-out rows, so there is no loss to average")
    return sum(row.loss_sum or 0.0 for row in rows), num_tokens


def token_mean(losses_RN: np.ndarray, num_tokens_RN: np.ndarray) -> np.ndarray:
    """Loss a token over N rows, R times."""
    mean_R: np.ndarray = (losses_RN * num_tokens_RN).sum(axis=-1) / num_tokens_RN.sum(axis=-1)
    return mean_R


def row_mean(row: RowOutcome) -> float:
    """Loss a token of one row; 0 where it has none."""
    return (row.loss_sum or 0.0) / max(row.num_tokens or 0, 1)
