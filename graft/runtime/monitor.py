"""The drift monitor: a named, detached, restartable Ray actor around a `DriftWatch`.

Replicas send it the mean input embeddings of user prompts; it tests them window by window against
the reference and, on drift, runs one renewal at a time as a Ray task. Ray restarts it when it dies;
it then continues from its journal.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from graft.core.errors import DataError, GraftError, ServingError
from graft.core.events import read_events
from graft.runtime.driftwatch import DriftWatch, MonitorSettings, Renewal, RenewalOutcome
from graft.runtime.loopstate import JOURNAL, LoopStatus, loop_folder
from graft.runtime.placement import ON_HEAD

logger = logging.getLogger(__name__)

NAMESPACE = "graft"
TICK_S = 0.5
_GONE_WITHIN_S = 30.0
_LOOK_EVERY_S = 0.05


def monitor_name(name: str) -> str:
    """Returns the actor's name for a served name."""
    return f"graft-monitor-{name}"


class MonitorActor:
    """The monitor as a Ray actor. Calls run one at a time; a thread begins and ends renewals."""

    def __init__(self, settings: MonitorSettings, renewal: Renewal | None) -> None:
        self._settings = settings
        self._renewal = renewal
        self._watch = DriftWatch(settings)
        self._lock = threading.RLock()
        self._is_stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch_renewals, daemon=True)
        self._thread.start()

    def observe(self, name: str, embeddings: np.ndarray) -> int:
        """Takes the embeddings of prompts to `name`; returns how many were usable."""
        if name != self._settings.name:
            raise DataError(f"the monitor of {self._settings.name!r} got prompts of {name!r}")
        with self._lock:
            return self._watch.observe(embeddings)

    def status(self) -> LoopStatus:
        """Where the loop stands; prompts of the unfinished window are counted."""
        with self._lock:
            seen = self._watch.num_prompts
            return self._watch.status.model_copy(update={"num_prompts": seen})

    def events(self, since: int = 0) -> list[dict[str, Any]]:
        """The journal's events, the first `since` left out."""
        folder = loop_folder(Path(self._settings.home), self._settings.name)
        return read_events(folder / JOURNAL)[since:]

    def pid(self) -> int:
        """The actor's process."""
        return os.getpid()

    def settings(self) -> MonitorSettings:
        """What the monitor was started with."""
        return self._settings

    def evaluating(self, number: int, evidence: dict[str, Any]) -> None:
        """Takes a renewal's word that its search is over and its gate begins."""
        with self._lock:
            status = self._watch.status
            if status.num_renewals == number and status.state == "RETRAINING":
                self._watch.move("EVALUATING", evidence)

    def stop(self) -> None:
        """Ends the watch: no renewal starts any more. One in flight ends with the actor."""
        self._is_stopping.set()
        with self._lock:
            self._watch.stop()

    def _watch_renewals(self) -> None:
        in_flight: Any = None
        while not self._is_stopping.wait(TICK_S):
            try:
                in_flight = self._tick(in_flight)
            except ServingError as error:
                logger.error("monitor %s ends: %s", self._settings.name, error)
                return
            except (GraftError, OSError):  # a full disk may be emptied: the next tick tries again
                logger.exception("monitor %s could not move on", self._settings.name)

    def _tick(self, in_flight: Any) -> Any:
        import ray

        if in_flight is not None:
            ready, _ = ray.wait([in_flight], timeout=0)
            if not ready:
                return in_flight
            outcome = self._outcome(in_flight)
            with self._lock:
                self._watch.settle(outcome)
            return None
        with self._lock:
            self._watch.calm()
            request = self._watch.next_renewal()
        if request is None or self._renewal is None:
            return None
        task = ray.remote(num_cpus=0, resources=ON_HEAD)(self._renewal)
        return task.options(name=f"renewal {request.number} of {request.name}").remote(request)

    @staticmethod
    def _outcome(in_flight: Any) -> RenewalOutcome:
        import ray

        try:
            outcome: RenewalOutcome = ray.get(in_flight)
        except (
            Exception
        ) as error:  # whatever broke in a renewal, the champion stays and the watch goes on
            logger.exception("a renewal broke")
            reason = (str(error).strip() or repr(error)).splitlines()[-1]
            return RenewalOutcome(
                state="REJECTED", evidence={"reasons": [f"the renewal broke: {reason}"]}
            )
        return outcome


def find_monitor(name: str) -> Any | None:
    """Returns the handle of the monitor of a served name, or None where none runs."""
    import ray

    try:
        return ray.get_actor(monitor_name(name), namespace=NAMESPACE)
    except ValueError:
        return None


def start_monitor(settings: MonitorSettings, renewal: Renewal | None) -> Any:
    """Starts the monitor of a served name, or returns the one that runs with these settings.

    The actor is detached: it outlives the process that started it, and Ray restarts it if it dies.
    """
    import ray

    running = find_monitor(settings.name)
    if running is not None:
        at_work = ray.get(running.settings.remote())
        if at_work in (settings, settings.model_copy(update={"renews": True})):
            return running  # one that renews watches, too
        stop_monitor(settings.name)
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)(MonitorActor)
    handle = actor.options(
        name=monitor_name(settings.name),
        namespace=NAMESPACE,
        lifetime="detached",
        resources=ON_HEAD,
    ).remote(settings, renewal)
    ray.get(handle.status.remote())
    return handle


def stop_monitor(name: str) -> bool:
    """Stops the monitor of a served name for good; False where none runs."""
    import ray

    running = find_monitor(name)
    if running is None:
        return False
    try:
        ray.get(running.stop.remote())
    finally:
        ray.kill(running, no_restart=True)
        deadline_s = time.monotonic() + _GONE_WITHIN_S  # Ray knows the name for a moment more
        while find_monitor(name) is not None and time.monotonic() < deadline_s:
            time.sleep(_LOOK_EVERY_S)
    return True
