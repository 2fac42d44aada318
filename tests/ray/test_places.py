"""Who waits for room keeps none of it, and hears that the run is to end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from graft.core.errors import TrainingError
from graft.runtime.placement import Places, WorkerNeeds, find_room
from graft.runtime.session import RaySession
from graft.runtime.train_workers import _Watch, train_on_workers
from graft.runtime.trials import is_asked_to_leave
from graft.runtime.worker import LEAVE_FILE
from tests.ray.test_train_workers import recipe_for

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\."),
]

WORKER = {"CPU": 0.95}


@contextmanager
def taken(count: int) -> Iterator[None]:
    """Others have so many places."""
    places = Places(WORKER, count)
    try:
        while places.num_placed() < count:
            time.sleep(0.05)
        yield
    finally:
        places.free()


def test_a_run_that_waits_for_its_smallest_number_keeps_no_part_of_it(
    ray_cluster: RaySession,
) -> None:
    cpus = ray_cluster.node_cpus
    with ThreadPoolExecutor(1) as threads:
        with taken(1):
            waiting = threads.submit(find_room, WorkerNeeds(WORKER, cpus, cpus + 1), 60.0)
            time.sleep(1.0)
            rest = WorkerNeeds(WORKER, cpus - 1, cpus - 1)
            assert find_room(rest, wait_s=5.0) == cpus - 1
            assert not waiting.done()
        assert waiting.result() == cpus


def test_waiting_for_room_ends_when_the_run_is_to_end(
    tmp_path: Path, model_folder: Path, data_folder: Path, ray_cluster: RaySession
) -> None:
    recipe = recipe_for(model_folder, data_folder)
    asked: list[float] = []

    def leaves() -> bool:
        asked.append(time.monotonic())
        return asked[-1] - asked[0] > 1.0

    started = time.monotonic()
    with taken(1), pytest.raises(TrainingError, match="told to end; step 0 is kept"):
        train_on_workers(recipe, home=tmp_path, folder=tmp_path / "run", leaves=leaves)
    assert time.monotonic() - started < 30


def test_a_question_without_an_answer_does_not_deafen_the_watch(tmp_path: Path) -> None:
    heard = threading.Event()

    def leaves() -> bool:
        if not heard.is_set():
            heard.set()
            raise ConnectionError("the cluster does not answer")
        return True

    with _Watch(tmp_path, WorkerNeeds(WORKER, 1, 1), 1, leaves, grow_after_s=60.0):
        deadline = time.monotonic() + 20
        while not (tmp_path / LEAVE_FILE).exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert (tmp_path / LEAVE_FILE).exists()
        assert not is_asked_to_leave(tmp_path), "the workers leave; no person ended the run"
