"""Importances on studies whose answer is known, and the Pareto front by hand."""

from __future__ import annotations

import random

import pytest
from scipy import stats

from graft.report import ObjectiveFacts, TrialFacts, front, importances
from graft.report.importance import _epsilon_squared, _ranks

LOSS = ObjectiveFacts(metric="eval/loss", mode="min")


def trial(number: int, value: float, **params: object) -> TrialFacts:
    """A complete trial."""
    return TrialFacts(
        number=number, state="complete", params=dict(params), metrics={"eval/loss": value}
    )


def test_a_setting_that_decides_comes_first_and_noise_stays_near_zero() -> None:
    rng = random.Random(3)
    trials = []
    for number in range(30):
        lr, seed = rng.uniform(-5, -1), rng.choice("abc")
        trials.append(trial(number, abs(lr + 3), lr=lr, kind=seed))
    first, second = importances(trials, LOSS)
    assert first.param == "lr"
    assert first.share > 0.5
    assert first.p_value < 0.01
    assert second.share < 0.2
    assert second.p_value > first.p_value


def test_few_trials_or_a_constant_setting_say_nothing() -> None:
    assert importances([trial(n, n, lr=n) for n in range(5)], LOSS) == ()
    assert importances([trial(n, n, lr=1) for n in range(9)], LOSS) == ()


def test_failed_trials_and_absent_branches_do_not_count() -> None:
    trials = [trial(n, n, r=n) for n in range(6)] + [trial(9, 0.0, other=1)]
    failed = TrialFacts(number=10, state="failed", params={"r": 3}, metrics={"eval/loss": 0.0})
    (only,) = importances([*trials, failed], LOSS)
    assert only.num_trials == 6


def test_ranks_and_the_uncorrected_share_agree_with_scipy() -> None:
    values, groups = [3.0, 1.0, 2.0, 2.0, 5.0, 4.0, 0.5], [0, 0, 1, 1, 2, 2, 0]
    ranks = _ranks(values)
    assert ranks == pytest.approx(list(stats.rankdata(values)))
    split = [[r for r, g in zip(ranks, groups, strict=True) if g == k] for k in range(3)]
    f = stats.f_oneway(*split).statistic
    num, k = len(ranks), 3
    expected = (k - 1) * (f - 1) / ((k - 1) * f + num - k)
    assert _epsilon_squared(ranks, groups) == pytest.approx(expected)


def test_the_front_keeps_what_nobody_beats() -> None:
    def sized(number: int, value: float, size: int) -> TrialFacts:
        return trial(number, value).model_copy(update={"adapter_bytes": size})

    trials = [sized(0, 0.5, 8), sized(1, 0.4, 16), sized(2, 0.45, 16), sized(3, 0.4, 16)]
    assert front(trials, [LOSS]) == (0, 1, 3)


def test_with_several_metrics_bytes_count_only_where_they_are_searched() -> None:
    match = ObjectiveFacts(metric="eval/match", mode="max")

    def sized(number: int, loss: float, of: float, size: int) -> TrialFacts:
        metrics = {"eval/loss": loss, "eval/match": of}
        return TrialFacts(
            number=number, state="complete", params={}, metrics=metrics, adapter_bytes=size
        )

    trials = [sized(0, 0.4, 0.9, 64), sized(1, 0.5, 0.8, 8)]
    assert front(trials, [LOSS, match]) == (0,)


def test_unknown_sizes_put_nobody_on_the_front() -> None:
    """A search that is not for bytes keeps the checkpoints of few trials."""
    kept = trial(0, 0.4).model_copy(update={"adapter_bytes": 16})
    assert front([kept, trial(1, 0.5), trial(2, 0.6)], [LOSS]) == (0,)


def test_the_front_is_of_every_searched_cost() -> None:
    searched = [LOSS, ObjectiveFacts(metric="cost/latency_ms", mode="min", unit="ms")]

    def timed(number: int, loss: float, ms: float) -> TrialFacts:
        metrics = {"eval/loss": loss, "cost/latency_ms": ms}
        return TrialFacts(number=number, state="complete", params={}, metrics=metrics)

    trials = [timed(0, 0.5, 20), timed(1, 0.4, 30), timed(2, 0.45, 31), timed(3, 0.6, 19)]
    assert front(trials, searched) == (0, 1, 3)
