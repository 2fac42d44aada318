"""From the trainings of each method to one row a method, and who stands on the front."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Literal

from graft.artifacts.record import MetricValue
from graft.pipelines.compare_contestants import Contestant
from graft.report.comparison_facts import BaseFacts, LossPoint, MethodFacts, PointFacts, SeedFacts


def done_row(
    contestant: Contestant,
    points: Sequence[PointFacts],
    best: PointFacts,
    seeds: Sequence[SeedFacts],
    base: BaseFacts,
    *,
    mergeable: bool,
    servable: Sequence[str],
) -> MethodFacts:
    """Sums up a method that was searched and trained."""
    general = _over_seeds([seed.general for seed in seeds])
    before = base.general.value if base.general is not None else None
    return MethodFacts(
        name=contestant.name,
        method=contestant.method,
        quantization=contestant.quantization,
        state="done",
        settings=best.params,
        mergeable=mergeable,
        servable=tuple(sorted(servable)),
        points=tuple(points),
        seeds=tuple(seeds),
        num_trainable=seeds[0].num_trainable,
        trainable_share=seeds[0].num_trainable / base.num_parameters,
        peak_bytes=max(seed.peak_bytes for seed in seeds),
        tokens_per_s=fmean(seed.tokens_per_s for seed in seeds),
        file_bytes=max(seed.file_bytes for seed in seeds),
        metrics={
            name: value
            for name in seeds[0].metrics
            if (value := _over_seeds([seed.metrics.get(name) for seed in seeds])) is not None
        },
        general=general,
        general_before=before,
        forgetting=general.value / before - 1 if general is not None and before else None,
    )


def _over_seeds(values: Sequence[MetricValue | None]) -> MetricValue | None:
    """The mean over seeds, in an interval that holds the interval of every seed."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    lows = [value.value if value.low is None else value.low for value in known]
    highs = [value.value if value.high is None else value.high for value in known]
    return MetricValue(
        value=fmean(value.value for value in known),
        low=min(lows),
        high=max(highs),
        rows=known[0].rows,
    )


def common_loss(rows: Sequence[MethodFacts]) -> float | None:
    """The lowest held-out loss that all trainings reached: the worst of their best.

    A method that never comes below the lowest start is left out: to a loss that others start with
    there is no time to measure.
    """
    start = min((seed.curve[0].loss for row in rows for seed in row.seeds), default=math.inf)
    worst = [max(_lowest(seed.curve) for seed in row.seeds) for row in rows if row.seeds]
    return max((loss for loss in worst if loss < start), default=None)


def with_seconds(row: MethodFacts, loss: float | None) -> MethodFacts:
    """Adds how long the method trained until that loss; None where a training never got there."""
    if loss is None or not row.seeds or any(_lowest(seed.curve) > loss for seed in row.seeds):
        return row.model_copy(update={"seconds_to_loss": None})
    seconds = fmean(seconds_to(seed.curve, loss) for seed in row.seeds)
    return row.model_copy(update={"seconds_to_loss": seconds})


def seconds_to(curve: Sequence[LossPoint], loss: float) -> float:
    """Training seconds until a held-out loss, between two measurements in proportion.

    The curve reaches it.
    """
    before = curve[0]
    for point in curve:
        if point.loss <= loss:
            if before.loss <= point.loss:
                return point.seconds
            share = (before.loss - loss) / (before.loss - point.loss)
            return before.seconds + share * (point.seconds - before.seconds)
        before = point
    raise ValueError(f"the curve never reaches {loss}; its best is {min(p.loss for p in curve)}")


def _lowest(curve: Sequence[LossPoint]) -> float:
    return min(point.loss for point in curve if point.steps)


def front_of(
    rows: Sequence[MethodFacts], quality: str, mode: Literal["min", "max"]
) -> tuple[str, ...]:
    """Names of the rows that none beats in quality, peak memory and file size at once."""
    sign = 1 if mode == "min" else -1
    costs = {
        row.name: (sign * row.metrics[quality].value, row.peak_bytes or 0, row.file_bytes or 0)
        for row in rows
        if row.state == "done" and quality in row.metrics
    }
    return tuple(
        name
        for name, own in costs.items()
        if not any(
            other != own and all(a <= b for a, b in zip(other, own, strict=True))
            for other in costs.values()
        )
    )
