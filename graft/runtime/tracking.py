"""Trials in Weights & Biases: one run a trial, written by the driver."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ray import tune

from graft.core.errors import ConfigError, MissingDependencyError
from graft.runtime.searcher import metrics_of
from graft.runtime.study import Study

if TYPE_CHECKING:
    import wandb

    from graft.recipe.operation import TrackSection


class WandbTracker(tune.Callback):
    """Keeps a run of W&B for every trial, under the group of its study.

    Ray's own callback starts two processes a trial; here all runs share the driver's one service.

    Args:
        study: Whose folder takes the files.
        section: Where runs go.

    Raises:
        MissingDependencyError: The package is not installed.
        ConfigError: Runs are to be sent and there is no key to send them with.
    """

    def __init__(self, study: Study, section: TrackSection) -> None:
        log_in(section)
        self._study = study
        self._section = section
        self._folder = study.folder / "wandb"
        self._folder.mkdir(exist_ok=True)
        self._runs: dict[int, wandb.Run] = {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Opens the trial's run; one that goes on after an interruption opens it again."""
        import wandb

        number, study = trial.config["trial"], self._study.folder.name
        self._runs[number] = wandb.init(
            project=self._section.project,
            group=study,
            name=f"trial-{number}",
            id=f"{study}-{number}",
            resume="allow" if self._section.wandb == "online" else None,
            mode="online" if self._section.wandb == "online" else "offline",
            dir=str(self._folder),
            config=trial.config["params"],
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off"),
        )

    def on_trial_result(
        self,
        iteration: int,
        trials: list[Any],
        trial: Any,
        result: dict[str, Any],
        **info: Any,
    ) -> None:
        """Adds the figures of a report."""
        if (run := self._runs.get(trial.config["trial"])) is not None:
            run.log(metrics_of(result), step=result["steps"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Closes the run."""
        self._close(trial.config["trial"])

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
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
            run.finish(exit_code=int(record.state == "failed"))

    def __reduce__(self) -> tuple[Callable[[], tune.Callback], tuple[()]]:
        return (tune.Callback, ())  # Tune pickles callbacks into a snapshot that nobody reads


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
