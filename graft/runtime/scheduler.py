"""When a trial is stopped: successive halving, rebuilt from reports on disk."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler

from graft.engine.run_folder import read_reports
from graft.recipe.costs import is_known_early
from graft.recipe.sections import AshaScheduler, SearchObjective
from graft.runtime.dominance import DominanceRungs

STEP = "steps"


class StudyScheduler(FIFOScheduler):
    """Asynchronous successive halving that remembers the trials of earlier drivers.

    For one metric it is Tune's own ASHA (arXiv 1810.05934); of several, a trial is stopped that
    enough others dominate (see `DominanceRungs`). A cost that is known at the end alone has no say.

    Args:
        section: The recipe's scheduler.
        objectives: Searched metrics.
        max_steps: Of the longest trial.
        ended: Folders of the trials that have ended; their reports fill the rungs.
    """

    def __init__(
        self,
        section: AshaScheduler,
        objectives: Sequence[SearchObjective],
        max_steps: int,
        ended: Iterable[Path],
    ) -> None:
        super().__init__()
        grace = min(section.grace_steps or max(1, max_steps // 4), max_steps)
        places: dict[str, Any] = {
            "time_attr": STEP,
            "max_t": max_steps,
            "grace_period": grace,
            "reduction_factor": section.reduction_factor,
        }
        early = [o for o in objectives if is_known_early(o.metric)]
        self._rungs: AsyncHyperBandScheduler | DominanceRungs = DominanceRungs(early, **places)
        if len(early) == 1:
            self._rungs = AsyncHyperBandScheduler(
                metric=early[0].metric, mode=early[0].mode, stop_last_trials=False, **places
            )
        for folder in ended:
            self._replay(SimpleNamespace(trial_id=str(folder)), folder)

    def _replay(self, trial: Any, folder: Path) -> None:
        self._rungs.on_trial_add(None, trial)
        for report in read_reports(folder):
            self._rungs.on_trial_result(None, trial, report)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Seats a trial; one that ran before keeps the rungs that it has passed."""
        self._replay(trial, Path(trial.config["folder"]))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Stops a trial that falls behind at a rung."""
        return str(self._rungs.on_trial_result(None, trial, result))

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Records the last report."""
        self._rungs.on_trial_complete(None, trial, result)

    def debug_string(self) -> str:
        """Names the rungs."""
        return str(self._rungs.debug_string())
