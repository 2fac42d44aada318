"""The gate's arithmetic, by hand and against SciPy's own bootstrap."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from graft.artifacts import MetricValue
from graft.engine.evaluate import EvalReport
from graft.metrics.base import METRICS, RowOutcome
from graft.pipelines.renewal_gate import Comparison, compare, judge
from graft.recipe.operation import GateSection


def report(metric: str, scores: list[float]) -> EvalReport:
    """A report with these scores a row."""
    value = MetricValue(value=sum(scores) / len(scores), rows=len(scores))
    return EvalReport(
        slot="a",
        metrics={f"eval/{metric}": value},
        scores={f"eval/{metric}": tuple(scores)},
        confidence=0.95,
    )


def comparison(gain: float) -> Comparison:
    """A comparison with this gain."""
    value = MetricValue(value=0.5, rows=10)
    return Comparison(
        metric="eval/exact_match",
        source="rows",
        num_rows=10,
        champion=value,
        successor=value,
        gain=gain,
        low=gain - 0.1,
        high=gain + 0.1,
        confidence=0.95,
    )


def test_more_exact_matches_and_less_loss_are_both_gains() -> None:
    matches = METRICS.build("exact_match")
    up = compare(
        matches, "rows", report("exact_match", [0, 0, 1]), report("exact_match", [1, 1, 1]), 0.95
    )
    assert up.gain == pytest.approx(2 / 3)
    loss = METRICS.build("loss")
    down = compare(loss, "rows", report("loss", [2.0, 3.0]), report("loss", [1.0, 2.5]), 0.95)
    assert down.gain == pytest.approx(0.75)
    assert down.low <= down.gain <= down.high


def test_the_interval_is_the_paired_bootstrap_of_scipy() -> None:
    rng = np.random.default_rng(0)
    before = rng.normal(2.0, 1.0, 200)
    after = before - rng.normal(0.1, 0.2, 200)
    found = compare(
        METRICS.build("loss"),
        "rows",
        report("loss", before.tolist()),
        report("loss", after.tolist()),
        0.9,
    )
    expected = stats.bootstrap(
        (before - after,), np.mean, confidence_level=0.9, method="percentile", rng=1
    ).confidence_interval
    assert found.low == pytest.approx(expected.low, abs=0.004)
    assert found.high == pytest.approx(expected.high, abs=0.004)
    # Paired: far narrower than two samples of this spread would allow.
    assert found.high - found.low < 0.06


@pytest.mark.parametrize("name", ["loss", "perplexity"])
def test_the_interval_is_of_the_gain_that_is_told_whatever_the_rows_weigh(name: str) -> None:
    """A long row weighs more than a short one, in the figures as in their interval."""
    metric, rng = METRICS.build(name), np.random.default_rng(0)
    tokens = rng.integers(1, 200, 60)
    before = rng.normal(2.0, 0.1, 60) + tokens / 100
    after = before - tokens / 100

    def measured(losses: np.ndarray) -> EvalReport:
        rows = [
            RowOutcome("", None, loss_sum=float(loss * n), num_tokens=int(n))
            for loss, n in zip(losses, tokens, strict=True)
        ]
        value, scores = metric.score(rows)
        return EvalReport(
            slot="a",
            metrics={f"eval/{name}": MetricValue(value=value, rows=60)},
            scores={f"eval/{name}": tuple(scores)},
            num_tokens=tuple(tokens.tolist()),
            confidence=0.9,
        )

    found = compare(metric, "rows", measured(before), measured(after), 0.9)
    assert found.low < found.gain < found.high
    unweighted = float(np.mean(tokens / 100))
    if name == "loss":
        assert found.gain == pytest.approx(float((tokens * tokens / 100).sum() / tokens.sum()))
        assert found.low > unweighted


@pytest.mark.parametrize(
    ("new", "old", "min_gain", "words"),
    [
        (0.30, -0.01, 0.0, ()),
        (0.30, 0.02, 0.30, ()),
        (0.0, 0.0, 0.0, ("more than 0 was wanted",)),
        (0.2, 0.0, 0.3, ("at least 0.3 was wanted",)),
        (0.3, -0.03, 0.0, ("worse by 0.0300",)),
        (-0.1, -0.5, 0.0, ("gains -0.1000", "worse by 0.5000")),
        (float("nan"), float("nan"), 0.0, ("gains nan", "worse by nan")),
    ],
)
def test_the_gate_wants_a_gain_on_new_rows_and_no_loss_on_old_ones(
    new: float, old: float, min_gain: float, words: tuple[str, ...]
) -> None:
    gate = GateSection(metric="eval/exact_match", margin=0.02, min_gain=min_gain)
    verdict = judge(gate, new=comparison(new), old=comparison(old))
    assert verdict.passed == (not words)
    assert len(verdict.reasons) == len(words)
    for reason, word in zip(verdict.reasons, words, strict=True):
        assert word in reason
