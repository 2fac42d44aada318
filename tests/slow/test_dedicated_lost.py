"""A dedicated trial whose process dies goes on from its checkpoint."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import psutil
import pytest

from graft.core.events import read_events
from graft.core.progress import Progress
from graft.engine.checkpoint import newest_step
from graft.engine.run_folder import CHECKPOINTS
from graft.pipelines.tune import tune
from graft.recipe.load import load_recipe
from tests.ray.test_search import pytestmark as of_search
from tests.ray.test_search import write_recipe

pytestmark = [*of_search, pytest.mark.slow]

STEPS = 200


class Notes(Progress):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def runners() -> list[psutil.Process]:
    """Processes of dedicated trials of this test's cluster, under the name that Tune gives them."""
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            if "ray::ResourceTrainable" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found


def kill_runner(trial: Path, killed: list[int]) -> None:
    """Kills the process of a trial once it has a checkpoint."""
    deadline = time.monotonic() + 400
    while not newest_step(trial / CHECKPOINTS) and time.monotonic() < deadline:
        time.sleep(0.02)
    for runner in runners():
        runner.kill()
        killed.append(newest_step(trial / CHECKPOINTS))


def test_a_trial_whose_process_dies_goes_on_from_its_checkpoint(
    model_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    path = write_recipe(
        tmp_path,
        model_folder,
        data_folder,
        name="lost",
        method={"type": "lora", "r": 4},
        train={
            "steps": STEPS,
            "batch_size": 16,
            "report_every": 10,
            "lr": {"log": [1e-4, 1e-2]},
        },
        search={
            "trials": 1,
            "executor": "dedicated",
            "scheduler": {"type": "asha", "grace_steps": 10},
            "eval_rows": 8,
        },
    )
    home, notes, killed = tmp_path / "home", Notes(), list[int]()
    folder = home / "studies" / "lost"
    killer = threading.Thread(target=kill_runner, args=(folder / "trials" / "0", killed))
    killer.start()
    result = tune(load_recipe(path), home=home, progress=notes)
    killer.join()
    assert len(killed) == 1
    assert 0 < killed[0] < STEPS
    (trial,) = result.trials
    assert (trial.state, trial.steps, result.num_run) == ("complete", STEPS, 1)
    events = read_events(folder / "events.jsonl")
    assert sum(event["event"] == "start" for event in events) == 2
    told = [event["steps"] for event in events if event["event"] == "report"]
    assert told == sorted(set(told)), "each step is counted once"
    assert list(trial.reports) == list(range(10, STEPS + 1, 10))
    assert any("trial 0 cannot go on now, and is taken up again" in words for words in notes.said)
