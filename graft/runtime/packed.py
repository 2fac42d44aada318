"""The packed executor: a Tune trial is a light actor that sits in a shared pack.

This module is loaded in every trial's process and must not import torch: those processes cost what
their imports cost.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import ray
from ray.tune import Trainable

from graft.core.errors import TrainingError
from graft.runtime.callbacks import TrialCallback

if TYPE_CHECKING:
    from graft.runtime.packs import Packs


class PackedTrial(Trainable):
    """A trial's seat in the pack, as Tune sees it.

    The config has the name of its pack's actor (`pack`), the trial's number (`trial`), `folder`,
    last step (`steps`) and the loss at which it stops before (`stop_at_loss`).
    """

    def setup(self, config: dict[str, Any]) -> None:
        """Learns which trial this is.

        The pack trains it already up to its first report. Its seat is made sure of at the first
        step and not here: Tune may make a process for a trial, then give the trial to one that
        became free and discard the first.
        """
        self._pack = ray.get_actor(config["pack"])
        self._number = int(config["trial"])
        self._folder = str(config["folder"])
        self._last_step = int(config["steps"])
        self._stop_at_loss = config.get("stop_at_loss")
        self._steps = 0
        self._is_seated = False

    def step(self) -> dict[str, Any]:
        """Lets the trial train up to its next report and returns that."""
        if not self._is_seated:
            ray.get(self._pack.join.remote(self._number, self._folder))
            self._is_seated = True
        report: dict[str, Any] | None = None
        while report is None:
            report = ray.get(self._pack.next_report.remote(self._number, self._steps))
        self._steps = int(report["steps"])
        has_learned = self._stop_at_loss is not None and report["train/loss"] <= self._stop_at_loss
        return {**report, "done": has_learned or self._steps >= self._last_step}

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Names the checkpoint in the trial's own folder that stands behind its last report.

        The pack wrote it before that report, and the trial has stood still since.
        """
        return {"folder": self._folder, "steps": self._steps}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Goes on behind the report that Tune saw last; the seat is taken at the next step.

        Raises:
            TrainingError: It is another trial's.
        """
        saved = checkpoint or {}
        if saved.get("folder") != self._folder:
            raise TrainingError(
                f"trial {self._number} in {self._folder} cannot go on from a checkpoint of "
                f"{saved.get('folder')}: a packed trial trains its own recipe from its own "
                "checkpoints; use a scheduler that stops and pauses trials, not one that copies "
                "them"
            )
        self._steps = int(saved["steps"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Gives the seat up and takes one for another trial: this process is used again."""
        self.cleanup()
        self.setup(new_config)
        return True

    def cleanup(self) -> None:
        """Gives the seat up."""
        if self._is_seated:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(self._pack.leave.remote(self._number))


class SeatCallback(TrialCallback):
    """Keeps an eye on the packs, and frees the seats of ended trials: their process may be gone.

    A pack is told of an end in the next round of Tune's loop, once it knows who comes instead: else
    it would do a step without that trial.
    """

    def __init__(self, packs: Packs) -> None:
        self._packs = packs
        self._left: list[int] = []

    def log_trial_start(self, trial: Any) -> None:
        """Notices that a trial's process is up."""
        self._packs.arrive(trial.config["trial"])

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Looks whether packs have their base; before Tune asks for trials."""
        self._packs.look()
        self._left = self._packs.left

    def log_trial_end(self, trial: Any, failed: bool = False) -> None:
        """Frees the seat."""
        self._packs.leave(trial.config["trial"])

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Tells the packs who had left before this round."""
        self._packs.tell_left(self._left)
