"""The monitor as a Ray actor: it outlives its kills, and renews once."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from graft.core.errors import ServingError
from graft.core.events import read_events
from graft.core.files import write_json
from graft.recipe.operation import WatchSection
from graft.runtime.driftwatch import MonitorSettings, Reference, RenewalOutcome, RenewalRequest
from graft.runtime.loopstate import JOURNAL, LoopJournal, loop_folder, read_status
from graft.runtime.monitor import find_monitor, start_monitor, stop_monitor
from graft.runtime.session import ray_session

pytestmark = pytest.mark.ray
NAME = "house"


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A local cluster for this file."""
    with ray_session("local", num_cpus=2):
        yield


def rows(seed: int, number: int, shift: float = 0.0) -> np.ndarray:
    """Embeddings of served prompts."""
    drawn = np.random.default_rng(seed).standard_normal((number, 5)) + shift
    return drawn.astype(np.float32)


def settings(home: Path) -> MonitorSettings:
    """Windows of 20 rows, false alarms 40,000 prompts apart."""
    folder = loop_folder(home, NAME)
    folder.mkdir(parents=True)
    np.savez(folder / "reference.npz", x_ref=rows(0, 60))
    watch = {"detectors": [{"type": "mmd", "window": 20}], "expected_run_length": 40_000}
    return MonitorSettings(
        name=NAME,
        home=str(home),
        recipe={},
        watch=WatchSection.model_validate(watch),
        cooldown_s=600.0,
        reference=Reference(file="reference.npz", num_rows=60, key="a", source="test rows"),
        renews=True,
    )


def until(claim: Callable[[], bool], within_s: float = 120.0) -> None:
    """Waits until a claim holds."""
    deadline_s = time.monotonic() + within_s
    while not claim():
        assert time.monotonic() < deadline_s, "the claim did not come true in time"
        time.sleep(0.1)


def ask(method: Any) -> Any:
    """The monitor's answer; Ray refuses calls for a moment after the actor is there again."""
    deadline_s = time.monotonic() + 60.0
    while True:
        try:
            return ray.get(method.remote())
        except ray.exceptions.ActorUnavailableError:
            assert time.monotonic() < deadline_s, "the monitor did not come back"
            time.sleep(0.1)


def events_of(home: Path, kind: str) -> list[dict[str, Any]]:
    """The journal's events of one kind."""
    found = read_events(loop_folder(home, NAME) / JOURNAL)
    return [event for event in found if event["event"] == kind]


def renewal_that_waits(request: RenewalRequest) -> RenewalOutcome:
    """Notes that it ran, and ends when the file `go` is there."""
    home = Path(request.home)
    write_json(home / f"renewal-{request.number}-{os.getpid()}.json", request.evidence)
    while not (home / "go").exists():
        time.sleep(0.05)
    return RenewalOutcome(state="REJECTED", evidence={"reasons": ["a test's word"]})


def test_a_killed_monitor_comes_back_with_its_journal_and_renews_once(
    cluster: None, tmp_path: Path
) -> None:
    monitor = start_monitor(settings(tmp_path), renewal_that_waits)
    try:
        assert ray.get(monitor.observe.remote(NAME, rows(1, 50))) == 50
        pid = ray.get(monitor.pid.remote())
        os.kill(pid, signal.SIGKILL)
        until(lambda: read_status(tmp_path, NAME).incarnation == 2)
        assert ask(monitor.status).num_prompts == 50

        ray.get(monitor.observe.remote(NAME, rows(2, 30, shift=2.0)))
        until(lambda: read_status(tmp_path, NAME).state == "RETRAINING")
        until(lambda: len(list(tmp_path.glob("renewal-1-*.json"))) == 1)
        os.kill(ask(monitor.pid), signal.SIGKILL)
        until(lambda: len(list(tmp_path.glob("renewal-1-*.json"))) == 2)
        write_json(tmp_path / "go", {})
        until(lambda: read_status(tmp_path, NAME).state == "REJECTED")
        ray.get(monitor.observe.remote(NAME, rows(3, 40, shift=2.0)))

        status = ask(monitor.status)
        assert (status.num_alarms, status.num_renewals, status.incarnation) == (1, 1, 3)
        assert [event["state"] for event in events_of(tmp_path, "state")] == [
            "RETRAINING",
            "REJECTED",
        ]
        prompts = [event["num_prompts"] for event in events_of(tmp_path, "verdict")]
        assert prompts == [20, 40, 60, 80, 100, 120]
        assert len(ray.get(monitor.events.remote(2))) == len(
            read_events(loop_folder(tmp_path, NAME) / JOURNAL)[2:]
        )
    finally:
        stop_monitor(NAME)
    assert find_monitor(NAME) is None
    assert read_status(tmp_path, NAME).is_stopped


def test_a_monitor_that_lost_its_journal_to_a_newer_one_refuses_to_write(
    cluster: None, tmp_path: Path
) -> None:
    given = settings(tmp_path)
    monitor = start_monitor(given, None)
    try:
        assert start_monitor(given, None) == monitor
        LoopJournal(loop_folder(tmp_path, NAME), NAME)
        with pytest.raises(ServingError, match="taken over"):
            ray.get(monitor.observe.remote(NAME, rows(2, 20, shift=2.0)))
    finally:
        ray.kill(monitor, no_restart=True)
    assert events_of(tmp_path, "verdict") == []
