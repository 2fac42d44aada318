"""The drift watch: observations in, journal out. What the monitor actor does, without Ray.

All that it knows is on disk: the journal says what happened, `checkpoint.json` how far the
detectors were, `observations-<k>.f32` what came since. A watch that is killed comes back from them
and gives no verdict twice.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from graft.core.errors import DataError
from graft.core.events import read_events
from graft.core.files import sha256_json, write_json
from graft.core.model import StrictModel
from graft.detectors.base import RunningDetector, Verdict
from graft.recipe.operation import WatchSection
from graft.runtime.loopstate import JOURNAL, LoopJournal, LoopStatus, State, loop_folder

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.json"


class Reference(StrictModel):
    """A fitted reference, a file in the loop's folder."""

    file: str
    num_rows: int
    key: str
    """Names what it was made from: base, data, rows, seed."""
    source: str
    """The same in words."""


class RenewalRequest(StrictModel):
    """What a renewal gets to know."""

    name: str
    home: str
    recipe: dict[str, Any]
    number: int
    """Counts from 1; a renewal begun again after a crash keeps its number."""
    evidence: dict[str, Any] | None
    """The verdict that raised the alarm."""


class RenewalOutcome(StrictModel):
    """What a renewal came to."""

    state: Literal["PROMOTED", "REJECTED"]
    evidence: dict[str, Any]
    reference: str | None = None
    """File of the reference that fits the successor's traffic; None keeps the old one."""


Renewal = Callable[[RenewalRequest], RenewalOutcome]


class MonitorSettings(StrictModel):
    """Everything a monitor is started with."""

    name: str
    home: str
    recipe: dict[str, Any]
    """The resolved recipe; renewals get it."""
    watch: WatchSection
    cooldown_s: float
    reference: Reference
    renews: bool
    """False watches only: an alarm stands until somebody acts."""


class DriftWatch:
    """Tests observations and keeps the journal. One thread at a time."""

    def __init__(self, settings: MonitorSettings) -> None:
        self.settings = settings
        self._folder = loop_folder(Path(settings.home), settings.name)
        self._journal = LoopJournal(self._folder, settings.name)
        if self.status.reference_key != settings.reference.key:
            self._journal.append("reference", **settings.reference.model_dump())
        self._detectors = build_detectors(settings.watch)
        self._num_features = 0
        self._num_prompts = self.status.num_prompts
        self._segment = 0
        self._refused: set[str] = set()
        self._watch_digest = sha256_json(settings.watch.model_dump(mode="json"))
        self._told = {
            (event["index"], event["num_prompts"])
            for event in read_events(self._folder / JOURNAL)
            if event["event"] == "verdict"
        }
        self._fit(self._load(str(self.status.reference)))
        self._recover()

    @property
    def status(self) -> LoopStatus:
        """Where the loop stands."""
        return self._journal.status

    @property
    def num_prompts(self) -> int:
        """Prompts seen so far, those of an unfinished window too."""
        return self._num_prompts

    def observe(self, embeddings: np.ndarray) -> int:
        """Takes observations, `[rows, features]` or `[features]`; returns how many were usable.

        One that is not finite or of another dimension is counted and journalled, never raised: the
        service that sends prompts must not fail because its watcher cannot use one.
        """
        rows = np.atleast_2d(np.asarray(embeddings, dtype=np.float32))
        num_usable = 0
        for row in rows:
            if self._is_usable(row):
                num_usable += 1
                with self._observations.open("ab") as file:
                    file.write(row.tobytes())
                if self._take(row):
                    self._save()
        return num_usable

    def _is_usable(self, row: np.ndarray) -> bool:
        reason = None
        if row.shape != (self._num_features,):
            reason = (
                f"{row.size} features where the reference has {self._num_features}; the embedding "
                "model changed: run `graft watch` with the recipe that serves"
            )
        elif not np.isfinite(row).all():
            reason = "NaN or infinite features"
        if reason is None:
            return True
        if reason not in self._refused:
            logger.warning("monitor %s refuses observations: %s", self.settings.name, reason)
            self._refused.add(reason)
        self._journal.append("refused", reason=reason, num_rows=1)
        return False

    def _take(self, row: np.ndarray) -> bool:
        """Shows one row to the detectors; True where a window ended."""
        self._num_prompts += 1
        verdicts = [
            (index, verdict)
            for index, detector in enumerate(self._detectors)
            if (verdict := detector.update(row)) is not None
        ]
        for index, verdict in verdicts:
            self._tell(index, verdict)
        return bool(verdicts)

    def _tell(self, index: int, verdict: Verdict) -> None:
        if (index, self._num_prompts) in self._told:
            return
        held_back = self._held_back() if verdict.is_drift else None
        self._journal.append(
            "verdict",
            **verdict.model_dump(),
            index=index,
            num_prompts=self._num_prompts,
            is_alarm=verdict.is_drift and held_back is None,
            held_back=held_back,
        )
        self._told.add((index, self._num_prompts))

    def _held_back(self) -> str | None:
        if self.status.is_busy:
            return f"already {self.status.state}"
        left_s = self.status.cooldown_left_s(self.settings.cooldown_s, time.time())
        return f"cool-down, {left_s:.0f} s left" if left_s > 0 else None

    def next_renewal(self) -> RenewalRequest | None:
        """Returns the renewal that should run now, if any; a new one is journalled as begun.

        Call it when none is in flight: after a crash it gives the one that was.
        """
        self._journal.catch_up()
        status = self.status
        if not self.settings.renews or not status.is_busy:
            return None
        evidence = status.evidence
        if status.state == "DRIFT":
            if status.is_paused:
                return None
            number = status.num_renewals + 1
            while (self._folder / f"renewal-{number}" / "result.json").exists():
                number += 1  # a person began that one, and it knew nothing of this alarm
            self.move("RETRAINING", evidence, renewal=number)
        return RenewalRequest(
            name=self.settings.name,
            home=self.settings.home,
            recipe=self.settings.recipe,
            number=self.status.num_renewals,
            evidence=evidence,
        )

    def move(self, state: State, evidence: dict[str, Any] | None, **fields: Any) -> None:
        """Journals a change of state."""
        self._journal.append("state", state=state, evidence=evidence, **fields)

    def settle(self, outcome: RenewalOutcome) -> None:
        """Takes a renewal's outcome; after a promotion the new traffic is the new reference."""
        reference = outcome.reference
        try:
            x_ref = None if reference is None else self._load(reference)
        except DataError as error:  # the promotion stands; the old reference must do
            logger.error("monitor %s keeps its reference: %s", self.settings.name, error)
            reference = x_ref = None
        self.move(outcome.state, outcome.evidence, reference=reference)
        if x_ref is not None:
            self._fit(x_ref)
            self._save()

    def calm(self) -> None:
        """Journals the return to STABLE once the cool-down is over."""
        self._journal.catch_up()
        left_s = self.status.cooldown_left_s(self.settings.cooldown_s, time.time())
        if self.status.state in ("PROMOTED", "REJECTED") and left_s <= 0:
            self.move("STABLE", None)

    def stop(self) -> None:
        """Journals a wanted end."""
        self._journal.append("stop")

    def _load(self, name: str) -> np.ndarray:
        file = self._folder / name
        try:
            with np.load(file, allow_pickle=False) as arrays:
                x_ref: np.ndarray = arrays["x_ref"]
        except (OSError, ValueError, KeyError) as error:
            raise DataError(
                f"the reference {file} cannot be read: {error}; remove {self._folder} and run "
                "`graft watch` again to fit a new one"
            ) from error
        return x_ref

    def _fit(self, x_ref: np.ndarray) -> None:
        for detector in self._detectors:
            detector.fit(x_ref)
        self._num_features = x_ref.shape[1]

    @property
    def _observations(self) -> Path:
        return self._folder / f"observations-{self._segment}.f32"

    def _save(self) -> None:
        """Moves the detectors' state into the checkpoint; the observations before it may go."""
        spent = self._observations
        write_json(
            self._folder / CHECKPOINT,
            {
                "reference": self.status.reference,
                "watch": self._watch_digest,
                "num_features": self._num_features,
                "num_prompts": self._num_prompts,
                "segment": self._segment + 1,
                "detectors": [detector.state_dict() for detector in self._detectors],
            },
        )
        self._segment += 1
        spent.unlink(missing_ok=True)

    def _recover(self) -> None:
        """Continues from the checkpoint and the observations that came after it."""
        path = self._folder / CHECKPOINT
        if path.exists():
            saved = json.loads(path.read_text(encoding="utf-8"))
            self._segment, self._num_prompts = saved["segment"], saved["num_prompts"]
            fits = (saved["reference"], saved["watch"]) == (
                self.status.reference,
                self._watch_digest,
            )
            if fits:
                for detector, state in zip(self._detectors, saved["detectors"], strict=True):
                    detector.load_state_dict(state)
            self._replay(saved["num_features"])
        self._save()

    def _replay(self, num_features: int) -> None:
        if not self._observations.exists():
            return
        data = self._observations.read_bytes()
        num_rows = len(data) // (4 * num_features)
        if num_features != self._num_features:
            self._num_prompts += num_rows  # of another base: counted, not comparable
            return
        rows = np.frombuffer(data, dtype=np.float32, count=num_rows * num_features)
        for row in rows.reshape(num_rows, num_features):
            self._take(row)


def build_detectors(watch: WatchSection) -> list[RunningDetector]:
    """Builds the detectors of a recipe so that together they keep its run length.

    Raises:
        ConfigError: One of them cannot.
    """
    # Each of several detectors has false alarms of its own, so each must be that much rarer.
    num_sharing = max(1, sum(detector.looks_at_data for detector in watch.detectors))
    return [
        detector.build(expected_run_length=watch.expected_run_length * num_sharing, seed=watch.seed)
        for detector in watch.detectors
    ]
