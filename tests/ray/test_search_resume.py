"""`kill -9` of the driver in mid-search, then the same command."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from graft.core.events import read_events
from graft.pipelines.tune import TuneResult, tune
from graft.recipe.load import load_recipe
from graft.runtime.session import RaySession
from tests.ray.test_search import pytestmark as of_search
from tests.ray.test_search import write_recipe

pytestmark = of_search

LRS = [1e-4, 3e-3, 1e-3, 5e-4]
DRIVER = """
import sys
from pathlib import Path
from graft.pipelines.tune import tune
from graft.recipe.load import load_recipe
tune(load_recipe(sys.argv[1]), home=Path(sys.argv[2]), address=sys.argv[3])
"""


def fixed_points(folder: Path, model_folder: Path, data_folder: Path, name: str) -> Path:
    return write_recipe(
        folder,
        model_folder,
        data_folder,
        name=name,
        method={"type": "lora", "r": 4},
        train={
            "steps": 24,
            "batch_size": 4,
            "report_every": 4,
            "lr": {"log": [1e-5, 1e-1]},
        },
        search={
            "trials": len(LRS),
            "points": [{"train.lr": lr} for lr in LRS],
            "scheduler": {"type": "none"},
            "pack_slots": 2,
            "eval_rows": 8,
        },
    )


def ends(events: list[dict[str, Any]]) -> list[int]:
    return [e["trial"] for e in events if e["event"] == "end" and e["state"] != "running"]


def kill_after(events: Path, process: subprocess.Popen[bytes], num_ended: int) -> None:
    """Kills the driver once so many trials have ended and another one has reported since."""
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline and process.poll() is None:
        seen = read_events(events)
        if len(ends(seen)) >= num_ended:
            last_end = max(i for i, e in enumerate(seen) if e["event"] == "end")
            if any(e["event"] == "report" for e in seen[last_end:]):
                break
        time.sleep(0.02)
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def results(
    model_folder: Path,
    data_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
    ray_cluster: RaySession,
) -> tuple[TuneResult, TuneResult, list[dict[str, Any]], int]:
    folder = tmp_path_factory.mktemp("resume")
    home = folder / "home"
    (folder / "killed").mkdir()
    (folder / "whole").mkdir()
    killed = fixed_points(folder / "killed", model_folder, data_folder, "killed")
    whole = fixed_points(folder / "whole", model_folder, data_folder, "whole")
    events = home / "studies" / "killed" / "events.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(killed), str(home), ray_cluster.address],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    kill_after(events, process, 2)
    before = len(read_events(events))
    resumed = tune(load_recipe(killed), home=home)
    return resumed, tune(load_recipe(whole), home=home), read_events(events), before


def test_no_finished_trial_is_repeated_and_none_is_lost(
    results: tuple[TuneResult, TuneResult, list[dict[str, Any]], int],
) -> None:
    resumed, _, events, before = results
    finished = ends(events[:before])
    assert finished
    assert 0 < resumed.num_run < len(LRS)
    later = {e["trial"] for e in events[before:] if e["event"] == "report"}
    assert not later & set(finished)
    assert sorted(ends(events)) == [t.number for t in resumed.trials] == [0, 1, 2, 3]
    assert {t.state for t in resumed.trials} == {"complete"}


def test_running_trials_go_on_from_their_checkpoints(
    results: tuple[TuneResult, TuneResult, list[dict[str, Any]], int],
) -> None:
    _, _, events, before = results
    reports = [(e["trial"], e["steps"]) for e in events if e["event"] == "report"]
    running = {e["trial"] for e in events[:before] if e["event"] == "start"}
    running -= set(ends(events[:before]))
    assert running
    for trial in running:
        again = [steps for number, steps in reports if number == trial]
        assert again == list(range(4, 25, 4))


def test_the_result_is_that_of_an_undisturbed_search(
    results: tuple[TuneResult, TuneResult, list[dict[str, Any]], int],
) -> None:
    resumed, whole, _, _ = results
    assert resumed.best.params == whole.best.params
    for one, other in zip(resumed.trials, whole.trials, strict=True):
        assert one.params == other.params
        assert one.metrics["eval/loss"] == pytest.approx(other.metrics["eval/loss"], rel=1e-4)
