"""How many equally likely tokens the model hesitates between."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from graft.metrics.base import METRICS, Metric, RowOutcome
from graft.metrics.loss import loss_totals, row_mean, token_mean

if TYPE_CHECKING:
    import numpy as np

_LARGEST_EXPONENT = 700.0
"""Beyond, a float overflows; a perplexity of e^700 is as bad as any."""


@METRICS.register
class PerplexityMetric(Metric):
    """`exp` of the mean loss a supervised token.

    Reference:
        Perplexity, a measure of the difficulty of speech recognition tasks, Jelinek et al. 1977.
    """

    type: Literal["perplexity"] = "perplexity"

    needs: ClassVar[Literal["loss", "generation"]] = "loss"
    mode: ClassVar[Literal["min", "max"]] = "min"

    def score(self, rows: list[RowOutcome]) -> tuple[float, list[float]]:
        """Returns the perplexity over all tokens, and each row's own."""
        total, num_tokens = loss_totals(rows)
        return _exp(total / num_tokens), [_exp(row_mean(row)) for row in rows]

    def pooled(self, scores_RN: np.ndarray, num_tokens_RN: np.ndarray) -> np.ndarray:
        """Takes `exp` of the mean loss a token, of which the scores are `exp` too."""
        import numpy as np

        pooled_R: np.ndarray = np.exp(token_mean(np.log(scores_RN), num_tokens_RN))
        return pooled_R


def _exp(loss: float) -> float:
    return math.exp(min(loss, _LARGEST_EXPONENT))
