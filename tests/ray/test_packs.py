"""A pack that loads its base: trials are seated meanwhile, and what fails is said."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from graft.core.errors import TrainingError
from graft.engine.run import load_run, train_run
from graft.engine.run_folder import RECIPE_FILE, read_reports
from graft.recipe import Recipe
from graft.runtime.pack_actor import end_packs, start_packs
from graft.runtime.packed import PackedTrial
from graft.runtime.packs import Packs
from graft.runtime.session import RaySession
from graft.runtime.shared_rows import share_rows
from graft.runtime.trials import Asked
from tests.ray.test_train_workers import pytestmark as of_workers
from tests.ray.test_train_workers import recipe_for

pytestmark = of_workers

STEPS = 4


@pytest.fixture
def recipe(model_folder: Path, data_folder: Path, tmp_path: Path) -> Recipe:
    """Of a trial whose data can be taken away."""
    return recipe_for(
        model_folder,
        shutil.copytree(data_folder, tmp_path / "data"),
        model={"source": str(model_folder), "dtype": "fp64", "device": "cpu"},
        train={"steps": STEPS, "batch_size": 4, "lr": 1e-3, "report_every": 2},
        scale={"threads": 1},
        search={"eval_rows": 8},
    )


def until(is_so: Callable[[], object], within_s: float = 120.0) -> Any:
    """Asks until the answer is yes; returns it."""
    deadline = time.monotonic() + within_s
    while not (answer := is_so()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return answer


def test_a_trial_is_seated_while_the_base_is_loaded_and_reads_the_drivers_rows(
    recipe: Recipe, tmp_path: Path, ray_cluster: RaySession
) -> None:
    run = load_run(recipe, tmp_path)
    train_run(run, tmp_path / "alone", home=tmp_path, eval_rows=8)
    shutil.rmtree(tmp_path / "data")
    rows = share_rows({recipe.objective.row_key: run.prepared})
    folder, said = tmp_path / "0", list[str]()
    folder.mkdir()
    (folder / RECIPE_FILE).write_text(recipe.model_dump_json())
    with Packs(
        recipe,
        tmp_path,
        slots=2,
        started=start_packs(recipe, ray_cluster),
        rows=rows,
        say=lambda event, **_: said.append(event),
    ) as packs:
        assert packs.has_seat()
        assert said == []
        seat = packs.take(Asked(0, recipe, {}), folder)
        assert not packs.has_seat(), "processes start one at a time beside a base that is loaded"
        packs.arrive(0)
        assert packs.has_seat()
        assert until(lambda: read_reports(folder)), "it trains without its process"
        trial = PackedTrial({**seat, "trial": 0, "folder": str(folder), "steps": STEPS})
        while not trial.train()["done"]:
            packs.look()
        trial.stop()
        packs.leave(0)
        packs.tell_left(packs.left)
        packs.look()
        assert said == ["pack"]
        assert until(lambda: ray.get(ray.get_actor(seat["pack"]).seated.remote()) == {})
    found, expected = read_reports(folder), read_reports(tmp_path / "alone")
    assert [report["steps"] for report in found] == [2, 4]
    for one, other in zip(found, expected, strict=True):
        assert one["train/loss"] == pytest.approx(other["train/loss"], abs=1e-6)
        assert one["eval/loss"] == pytest.approx(other["eval/loss"], abs=1e-6)


def test_a_pack_that_cannot_load_ends_the_turn_with_the_reason(
    recipe: Recipe, tmp_path: Path, ray_cluster: RaySession
) -> None:
    shutil.rmtree(tmp_path / "data")
    with Packs(recipe, tmp_path, slots=2, started=start_packs(recipe, ray_cluster)) as packs:
        assert packs.has_seat()
        packs.take(Asked(0, recipe, {}), tmp_path)

        def loss() -> Any:
            return packs.loss_of(0)

        assert until(loss).needed_bytes is None
        with pytest.raises(TrainingError, match=r"^data file .*train\.jsonl"):
            packs.look()


def test_a_process_that_is_not_wanted_frees_its_place(
    recipe: Recipe, tmp_path: Path, ray_cluster: RaySession
) -> None:
    def free() -> float:
        return float(ray.available_resources().get("CPU", 0.0))

    before = ray.cluster_resources()["CPU"]
    assert until(lambda: free() == before)
    started = start_packs(recipe, ray_cluster)
    asked = started[0].actor.seated.remote()
    assert until(lambda: free() < before)
    assert ray.wait([asked], timeout=0.5)[0] == [], "it has no base to answer with"
    end_packs(started)
    assert started == []
    assert until(lambda: free() == before)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(asked)
