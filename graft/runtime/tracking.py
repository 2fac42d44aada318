"""Trials in Weights & Biases: one run a trial, written by the driver."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from graft.core.errors import ConfigError, MissingDependencyError
from graft.core.progress import Progress
from graft.runtime.callbacks import TrialCallback
from graft.runtime.study import Study
from graft.runtime.trials import metrics_of

if TYPE_CHECKING:
    import wandb

    from graft.recipe.operation import TrackSection


class WandbTracker(TrialCallback):
    """Keeps a run of W&B for every trial, under the group of its study.

    Ray's own for W&B starts two processes a trial; here all runs share the driver's one service. If
    W&B cannot be reached any longer, runs are kept offline and the search goes on.

    Args:
        study: Whose folder takes the files.
        section: Where runs go.
        progress: Told when runs cannot be sent.

    Raises:
        MissingDependencyError: The package is not installed.
        ConfigError: Runs are to be sent and there is no key to send them with.
    """

    def __init__(self, study: Study, section: TrackSection, progress: Progress) -> None:
        log_in(section)
        self._study = study
        self._project = section.project
        self._is_online = section.wandb == "online"
        self._progress = progress
        self._folder = study.folder / "wandb"
        self._folder.mkdir(exist_ok=True)
        self._runs: dict[int, wandb.Run] = {}

    def log_trial_start(self, trial: Any) -> None:
        """Opens the trial's run; one that goes on after an interruption opens it again."""
        import wandb

        number = trial.config["trial"]
        try:
            self._runs[number] = self._open(number, trial.config["params"])
        except wandb.Error as error:
            if not self._is_online:
                raise
            self._is_online = False
            self._progress.note(
                f"track.wandb: online: {error}; runs are kept in {self._folder} from here on, "
                "`wandb sync` sends them"
            )
            # The service holds the run's id for as long as it tries.
            self._runs[number] = self._open(number, trial.config["params"], suffix="-offline")

    def _open(self, number: int, params: dict[str, Any], suffix: str = "") -> wandb.Run:
        import wandb

        study = self._study.folder.name
        return wandb.init(
            project=self._project,
            group=study,
            name=f"trial-{number}",
            id=f"{study}-{number}{suffix}",
            resume="allow" if self._is_online else None,
            mode="online" if self._is_online else "offline",
            dir=str(self._folder),
            config=params,
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log_trial_result(self, iteration: int, trial: Any, result: dict[str, Any]) -> None:
        """Adds the figures of a report."""
        if (run := self._runs.get(trial.config["trial"])) is not None:
            run.log(metrics_of(result), step=result["steps"])

    def log_trial_end(self, trial: Any, failed: bool = False) -> None:
        """Closes the run."""
        self._close(trial.config["trial"])

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """Closes runs of trials that go on another time."""
        for number in list(self._runs):
            self._close(number)

    def _close(self, number: int) -> None:
        if (run := self._runs.pop(number, None)) is not None:
            record = self._study.trial(number)
            run.summary["state"] = record.state
            run.finish(exit_code=int(record.state in ("failed", "infeasible")))


def log_in(section: TrackSection) -> None:
    """Sees to it that runs can be kept, and sent if that is asked.

    Raises:
        MissingDependencyError: The package is not installed.
        ConfigError: There is no key to send runs with.
    """
    if importlib.util.find_spec("wandb") is None:
        raise MissingDependencyError(
            f"track.wandb: {section.wandb} needs the package wandb; pip install 'graft[wandb]'"
        )
    if section.wandb != "online":
        return
    import wandb

    try:
        has_key = wandb.login()
    except wandb.Error as error:
        raise ConfigError(f"track.wandb: online: {error}") from error
    if not has_key:
        raise ConfigError(
            "track.wandb: online has no key; run `wandb login`, set WANDB_API_KEY, or use offline"
        )
