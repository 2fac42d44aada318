"""Successive halving by several metrics at once: trials that enough others dominate are stopped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from ray.tune.schedulers import TrialScheduler

from graft.core.pareto import Fronts
from graft.recipe.search import SearchObjective


class DominanceRungs:
    """The rungs of asynchronous successive halving, where rank is the front of a trial.

    A trial that comes to a rung is compared with those that came there before it. All of them are
    sorted into fronts: nothing there dominates a trial of front 0, only front 0 does one of front
    1, and so on. It is stopped where as many trials as may go on, `n / reduction_factor` of n
    rounded up, stand in better fronts. With one metric fronts are ranks, and this is ASHA; a trial
    that no other one dominates is never stopped, and a metric that is the same at every rung (the
    bytes of an adapter) saves a trial only from those that cost more.

    Has the hooks of Tune's `AsyncHyperBandScheduler` that a scheduler of schedulers calls.

    Args:
        objectives: Metrics that are in every report.
        time_attr: What rungs are counted in.
        max_t: Of the longest trial.
        grace_period: The first rung.
        reduction_factor: Of trials from rung to rung, and between the rungs' places.

    Reference:
        Multi-objective Asynchronous Successive Halving, Schmucker et al., arXiv 2106.12639. There
        the front that crosses the limit is thinned out by spread; here it goes on whole.
    """

    def __init__(
        self,
        objectives: Iterable[SearchObjective],
        *,
        time_attr: str,
        max_t: int,
        grace_period: int,
        reduction_factor: int,
    ) -> None:
        self._signs = {o.metric: 1 if o.mode == "min" else -1 for o in objectives}
        self._time = time_attr
        self._factor = reduction_factor
        self._rungs: list[tuple[int, set[str], Fronts]] = []
        """Place, the trials that came there, and their costs; the last rung first."""
        place = grace_period
        while place <= max_t:
            self._rungs.insert(0, (place, set(), Fronts()))
            place *= reduction_factor

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Does nothing: a trial is known by the rungs that it came to."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: Mapping[str, float]) -> str:
        """Decides at the last rung that a report has reached, once."""
        costs = [sign * result.get(metric, math.nan) for metric, sign in self._signs.items()]
        if self._time not in result or not all(map(math.isfinite, costs)):
            return str(TrialScheduler.CONTINUE)
        for place, reached, fronts in self._rungs:
            if result[self._time] < place:
                continue
            if trial.trial_id in reached:
                break
            reached.add(trial.trial_id)
            num_better = fronts.num_before(fronts.add(costs))
            is_beaten = num_better >= math.ceil(len(reached) / self._factor)
            return str(TrialScheduler.STOP if is_beaten else TrialScheduler.CONTINUE)
        return str(TrialScheduler.CONTINUE)

    def on_trial_complete(
        self, tune_controller: Any, trial: Any, result: Mapping[str, float]
    ) -> None:
        """Records the last report."""
        self.on_trial_result(tune_controller, trial, result)

    def debug_string(self) -> str:
        """Counts the trials of each rung."""
        told = ", ".join(f"{place}: {len(reached)}" for place, reached, _ in reversed(self._rungs))
        return f"Rungs by dominance, trials at each: {told}"
