"""What workers find room for, and that drivers stand where they last."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import tune

from graft.core.errors import TrainingError
from graft.engine.checkpoint import newest_step
from graft.engine.run_folder import CHECKPOINTS, read_reports
from graft.runtime.placement import (
    ON_HEAD,
    Places,
    WorkerNeeds,
    bare_processes,
    find_room,
    node_places,
)
from graft.runtime.session import ray_session
from graft.runtime.train_workers import train_on_workers
from tests.ray.test_train_workers import recipe_for

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\."),
]

WORKER = {"CPU": 0.95}


@pytest.fixture(scope="module")
def cpus() -> Iterator[int]:
    with ray_session(num_cpus=2):
        yield int(ray.cluster_resources()["CPU"])


def test_a_run_takes_the_room_that_there_is_between_its_bounds(cpus: int) -> None:
    assert find_room(WorkerNeeds(WORKER, 1, cpus)) == cpus
    assert find_room(WorkerNeeds(WORKER, 1, cpus + 3)) == cpus
    assert node_places(WORKER) == [cpus]


class Idle(tune.Trainable):
    """A trial that tells the environment of its process."""

    def step(self) -> dict[str, Any]:
        """Reports once."""
        own = ray.get_runtime_context().get_runtime_env_string()
        return {"environment": own, "done": True}


def environment_of_trial(storage: Path) -> str:
    results = tune.Tuner(
        Idle,
        run_config=tune.RunConfig(
            storage_path=str(storage),
            verbose=0,
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    ).fit()
    return str(results[0].metrics["environment"])


def test_bare_processes_have_no_environment_of_their_own(cpus: int, tmp_path: Path) -> None:
    with bare_processes():
        assert environment_of_trial(tmp_path / "bare") == "{}"
    assert "PL_DISABLE_FORK" in environment_of_trial(tmp_path / "given")


def test_places_that_others_have_are_no_room(cpus: int) -> None:
    others = Places(WORKER, 1)
    try:
        while not others.num_placed():
            time.sleep(0.05)
        assert find_room(WorkerNeeds(WORKER, 1, cpus)) == cpus - 1
        with pytest.raises(TrainingError, match=rf"needs {cpus} workers .* room for {cpus - 1}"):
            find_room(WorkerNeeds(WORKER, cpus, cpus), wait_s=5.0)
    finally:
        others.free()
    assert find_room(WorkerNeeds(WORKER, cpus, cpus)) == cpus


def test_more_than_the_cluster_has_is_waited_for_only_so_long(cpus: int) -> None:
    started = time.monotonic()
    with pytest.raises(TrainingError) as refused:
        find_room(WorkerNeeds(WORKER, cpus + 1, cpus + 1), wait_s=1.0)
    assert time.monotonic() - started < 30
    words = str(refused.value)
    assert f"needs {cpus + 1} workers" in words
    assert f"the cluster has {cpus} CPUs" in words
    assert "gave up after" in words


def test_a_driver_stands_on_the_head_node_and_takes_no_core(cpus: int) -> None:
    @ray.remote(num_cpus=0, resources=ON_HEAD)
    def where() -> str:
        return str(ray.get_runtime_context().get_node_id())

    head = [n["NodeID"] for n in ray.nodes() if "node:__internal_head__" in n["Resources"]]
    assert ray.get([where.remote() for _ in range(3)]) == head * 3


@pytest.mark.slow
def test_workers_told_to_leave_keep_their_step_and_the_same_call_goes_on(
    tmp_path: Path, model_folder: Path, data_folder: Path, cpus: int
) -> None:
    train = {"steps": 40, "batch_size": 7, "lr": 5e-3, "micro_batch_tokens": 60, "report_every": 5}
    recipe = recipe_for(model_folder, data_folder, train=train)
    folder = tmp_path / "run"
    with pytest.raises(TrainingError, match=r"told to end; step \d+ is kept"):
        train_on_workers(
            recipe,
            home=tmp_path,
            folder=folder,
            leaves=lambda: newest_step(folder / CHECKPOINTS) >= 5,
        )
    assert 5 <= newest_step(folder / CHECKPOINTS) < 40
    assert train_on_workers(recipe, home=tmp_path, folder=folder).steps == 40
    assert [report["steps"] for report in read_reports(folder)] == list(range(5, 41, 5))
