"""When a trial is stopped: successive halving, rebuilt from reports on disk."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler

from graft.engine.run_folder import read_reports
from graft.recipe.costs import is_known_early
from graft.recipe.search import AshaScheduler, SearchObjective
from graft.runtime.budget import Budget
from graft.runtime.dominance import DominanceRungs

STEP, TOKENS = "steps", "tokens"


class StudyScheduler(FIFOScheduler):
    """Asynchronous successive halving that remembers the trials of earlier drivers.

    For one metric it is Tune's own ASHA (arXiv 1810.05934); of several, a trial is stopped that
    enough others dominate (see `DominanceRungs`). A cost that is known at the end alone has no say.

    Args:
        section: The recipe's scheduler.
        objectives: Searched metrics.
        longest: Steps or tokens of the longest trial, whichever rungs count.
        ended: Folders of the trials that have ended, and their last steps, by the folders that they
            are known by; their reports up to there fill the rungs.
    """

    def __init__(
        self,
        section: AshaScheduler,
        objectives: Sequence[SearchObjective],
        longest: int,
        ended: Mapping[Path, tuple[Path, int]],
    ) -> None:
        super().__init__()
        grace = section.grace_tokens if section.unit == TOKENS else section.grace_steps
        first = grace if isinstance(grace, int) else max(1, longest // 4)
        places: dict[str, Any] = {
            "time_attr": section.unit,
            "max_t": longest,
            "grace_period": min(first, longest),
            "reduction_factor": section.reduction_factor,
        }
        early = [o for o in objectives if is_known_early(o.metric)]
        self._rungs: AsyncHyperBandScheduler | DominanceRungs = DominanceRungs(early, **places)
        if len(early) == 1:
            self._rungs = AsyncHyperBandScheduler(
                metric=early[0].metric, mode=early[0].mode, stop_last_trials=False, **places
            )
        for origin, (folder, last) in ended.items():
            self._pass_again(origin, folder, last)

    def _pass_again(self, origin: Path | str, folder: Path, last: float = math.inf) -> None:
        trial = _known_by(origin)
        self._rungs.on_trial_add(None, trial)
        for report in read_reports(folder):
            if report[STEP] <= last:  # what workers did past their trial's end was not asked of it
                self._rungs.on_trial_result(None, trial, report)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Seats a trial; one that ran before keeps the rungs that it has passed."""
        self._pass_again(trial.config["origin"], Path(trial.config["folder"]))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Stops a trial that falls behind at a rung."""
        return str(self._rungs.on_trial_result(None, _known_by(trial.config["origin"]), result))

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Records the last report."""
        self._rungs.on_trial_complete(None, _known_by(trial.config["origin"]), result)

    def debug_string(self) -> str:
        """Names the rungs."""
        return str(self._rungs.debug_string())


def _known_by(origin: Path | str) -> SimpleNamespace:
    """Returns what rungs know a trial by: one that goes on, under any number, is the same one."""
    return SimpleNamespace(trial_id=str(origin))


class BudgetScheduler(FIFOScheduler):
    """Pauses every trial at its next report once the study's budget is spent.

    Args:
        within: Decides first: what it stops is told stopped.
        budget: Is told of every report.
    """

    def __init__(self, within: TrialScheduler, budget: Budget) -> None:
        super().__init__()
        self._within = within
        self._budget = budget

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Seats a trial."""
        self._within.on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Stops a trial that is given up, or that no budget is left for."""
        self._count(trial, result)
        decision = str(self._within.on_trial_result(tune_controller, trial, result))
        if decision == TrialScheduler.STOP or self._budget.spent is None:
            return decision
        self._budget.pause(trial.config["trial"])
        return str(TrialScheduler.STOP)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Counts the last report, which no decision is asked about."""
        self._count(trial, result)
        self._within.on_trial_complete(tune_controller, trial, result)

    def debug_string(self) -> str:
        """Names what is spent, and the rungs."""
        return f"{self._budget.spending.words}\n{self._within.debug_string()}"

    def _count(self, trial: Any, result: dict[str, Any]) -> None:
        if TOKENS in result:  # a trial that ends before its first report here has none
            self._budget.count(trial.config["trial"], int(result[TOKENS]))
