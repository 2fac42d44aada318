"""Which parameters moved the result, and which trials nobody beats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from graft.core.pareto import Front
from graft.report.facts import Importance, ObjectiveFacts, TrialFacts

MIN_TRIALS = 6
_SHUFFLES = 2000
_BINS = 3


def importances(
    trials: Sequence[TrialFacts], objective: ObjectiveFacts, seed: int = 0
) -> tuple[Importance, ...]:
    """Explains the order of the trials by one parameter at a time, most important first.

    Numbers are cut into up to three groups of equal size, so that an optimum in the middle of a
    range counts; choices are groups already. Stopped trials enter with their last value. Parameters
    that fewer than six trials have, or that never varied, are left out.

    Reference:
        Epsilon squared: Kelley, An Unbiased Correlation Ratio Measure, PNAS 21(9), 1935.
    """
    scored = [
        t for t in trials if t.state in ("complete", "stopped") and _value(t, objective) is not None
    ]
    found = []
    for param in sorted({name for trial in scored for name in trial.params}):
        having = [trial for trial in scored if param in trial.params]
        groups = _groups([trial.params[param] for trial in having])
        if len(having) < MIN_TRIALS or len(set(groups)) < 2:
            continue
        ranks = _ranks([_value(trial, objective) or 0.0 for trial in having])
        share = _epsilon_squared(ranks, groups)
        found.append(
            Importance(
                param=param,
                share=max(0.0, share),
                p_value=(_num_as_large(ranks, groups, seed) + 1) / (_SHUFFLES + 1),
                num_trials=len(having),
            )
        )
    return tuple(sorted(found, key=lambda item: (-item.share, item.param)))


def front(trials: Sequence[TrialFacts], objectives: Sequence[ObjectiveFacts]) -> tuple[int, ...]:
    """Numbers of the complete trials that none beats in every searched metric.

    With one metric adapter bytes are the second, where they are known of all: a search that is not
    for them keeps few checkpoints.
    """
    found = [
        trial
        for trial in trials
        if trial.state == "complete" and all(o.metric in trial.metrics for o in objectives)
    ]
    sizes = [trial.adapter_bytes for trial in found]
    has_sizes = len(objectives) == 1 and None not in sizes
    costs = (
        [
            *(_cost(trial, objective) for objective in objectives),
            float(trial.adapter_bytes or 0) if has_sizes else 0.0,
        ]
        for trial in found
    )
    numbers = (trial.number for trial in found)
    return tuple(Front(zip(numbers, costs, strict=True)).names)


def _cost(trial: TrialFacts, objective: ObjectiveFacts) -> float:
    return trial.metrics[objective.metric] * (1 if objective.mode == "min" else -1)


def _value(trial: TrialFacts, objective: ObjectiveFacts) -> float | None:
    return trial.metrics.get(objective.metric)


def _groups(values: Sequence[Any]) -> list[int]:
    """The group of each value."""
    is_number = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    known = sorted(set(values), key=lambda v: v if is_number else str(v))
    if not is_number or len(known) <= _BINS:
        return [known.index(value) for value in values]
    num_bins = _BINS if len(values) >= 3 * _BINS else 2
    # Equal values share a rank, and so a group.
    return [int((rank - 0.5) * num_bins // len(values)) for rank in _ranks(values)]


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1; equal values share the mean of theirs."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for index in order[start : end + 1]:
            ranks[index] = (start + end) / 2 + 1
        start = end + 1
    return ranks


def _num_as_large(ranks: Sequence[float], groups: Sequence[int], seed: int) -> int:
    """Counts the shuffles that part the ranks between the groups as far as they are parted."""
    _, group_of = np.unique(groups, return_inverse=True)
    ranked, counts = np.asarray(ranks), np.bincount(group_of)

    def parted(order: np.ndarray) -> float:
        return float((np.bincount(group_of, weights=order) ** 2 / counts).sum())

    rng, least = np.random.default_rng(seed), parted(ranked) * (1 - 1e-12)
    return sum(parted(rng.permutation(ranked)) >= least for _ in range(_SHUFFLES))


def _epsilon_squared(ranks: Sequence[float], groups: Sequence[int]) -> float:
    """Share of the ranks' variance between the groups, unbiased; may fall below 0."""
    num, num_groups = len(ranks), len(set(groups))
    mean = sum(ranks) / num
    total = sum((rank - mean) ** 2 for rank in ranks)
    if total == 0 or num <= num_groups:
        return 0.0
    between = 0.0
    for group in set(groups):
        members = [rank for rank, own in zip(ranks, groups, strict=True) if own == group]
        between += len(members) * (sum(members) / len(members) - mean) ** 2
    return 1 - (1 - between / total) * (num - 1) / (num - num_groups)
