"""The gate on frozen rows: better on the new ones, no worse on the old, or the champion stays."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from graft.artifacts import MetricValue
from graft.core.model import Listed, StrictModel
from graft.core.seeds import derive_seed

if TYPE_CHECKING:
    from graft.engine.evaluate import EvalReport
    from graft.metrics.base import Metric
    from graft.recipe.operation import GateSection

NUM_RESAMPLES = 2000


class Comparison(StrictModel):
    """Champion and successor on the same rows."""

    metric: str
    source: str
    """The rows."""
    num_rows: int
    champion: MetricValue
    successor: MetricValue
    gain: float
    """How much better the successor is, in the metric's own unit; below 0 it is worse."""
    low: float
    high: float
    """Of the gain: percentile bootstrap over rows, champion and successor resampled together."""
    confidence: float


class GateReport(StrictModel):
    """What the gate saw and said."""

    new: Comparison
    old: Comparison
    min_gain: float
    margin: float
    reasons: Listed[str] = ()
    """Why it refused; empty means passed."""

    @property
    def passed(self) -> bool:
        """True where the successor may replace the champion."""
        return not self.reasons


def compare(
    metric: Metric, source: str, champion: EvalReport, successor: EvalReport, confidence: float
) -> Comparison:
    """Pairs two reports on the same rows."""
    name = f"eval/{metric.type}"
    sign = 1.0 if metric.mode == "max" else -1.0
    scores_N = [np.array(report.scores[name]) for report in (champion, successor)]
    num_rows = len(scores_N[0])
    is_loss = metric.needs == "loss" and champion.num_tokens
    num_tokens_N = np.array(champion.num_tokens if is_loss else [1] * num_rows)
    rng = np.random.default_rng(derive_seed("gate", name, num_rows))
    drawn_RN = rng.integers(0, num_rows, (NUM_RESAMPLES, num_rows))
    weights_RN = num_tokens_N[drawn_RN]
    before_R, after_R = (metric.pooled(scores[drawn_RN], weights_RN) for scores in scores_N)
    gains_R = sign * (after_R - before_R)
    low, high = np.quantile(gains_R, [(1 - confidence) / 2, (1 + confidence) / 2])
    before, after = champion.metrics[name], successor.metrics[name]
    return Comparison(
        metric=name,
        source=source,
        num_rows=num_rows,
        champion=before,
        successor=after,
        gain=sign * (after.value - before.value),
        low=float(low),
        high=float(high),
        confidence=confidence,
    )


def judge(gate: GateSection, *, new: Comparison, old: Comparison) -> GateReport:
    """Decides. A successor that is only as good as the champion is refused: nothing is won."""
    reasons = []
    if not (new.gain > 0 and new.gain >= gate.min_gain):
        wanted = f"at least {gate.min_gain:g}" if gate.min_gain > 0 else "more than 0"
        reasons.append(
            f"on the new rows {new.metric} gains {new.gain:.4f} (of {new.num_rows} rows; from "
            f"{new.champion.value:.4f} to {new.successor.value:.4f}), {wanted} was wanted"
        )
    if not old.gain >= -gate.margin:
        reasons.append(
            f"on the old rows {old.metric} is worse by {-old.gain:.4f} (of {old.num_rows} rows; "
            f"from {old.champion.value:.4f} to {old.successor.value:.4f}), {gate.margin:g} is "
            "allowed"
        )
    return GateReport(
        new=new, old=old, min_gain=gate.min_gain, margin=gate.margin, reasons=tuple(reasons)
    )
