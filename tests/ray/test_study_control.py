"""A real search, driven by another process, on which a person acts from outside."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from graft.core.events import read_events
from graft.pipelines.study import clone, resume, show_study, stop
from graft.pipelines.tune import tune
from graft.recipe.load import load_recipe
from graft.runtime.session import RaySession
from graft.runtime.trials import STOPPED_BY_PERSON
from tests.ray.test_search import pytestmark as of_search
from tests.ray.test_search import write_recipe

pytestmark = of_search

ENDLESS = 1_000_000


class Driven:
    """`graft tune` in a process of its own: trial 0 and 2 never end, 1 is short, one is left."""

    def __init__(self, recipe: Path, home: Path, address: str) -> None:
        self.recipe = recipe
        self.home = home
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "graft.cli", "tune", str(recipe)),
                *("--home", str(home), "--address", address),
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )

    def reported(self, trial: int) -> list[int]:
        """Steps of a trial's reports, as the driver told them."""
        events: list[dict[str, Any]] = read_events(self.home / "studies" / "tiny" / "events.jsonl")
        return [e["steps"] for e in events if e["event"] == "report" and e["trial"] == trial]

    def told(self, trial: int) -> tuple[str, str | None]:
        """State and reason of a trial."""
        record = show_study("tiny", home=self.home).trials[trial]
        return record.state, record.reason

    def wait_until(self, happened: Callable[[], bool]) -> None:
        """Waits while the driver lives."""
        deadline = time.monotonic() + 240
        while not happened():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.1)


@pytest.fixture
def driven(
    model_folder: Path, data_folder: Path, tmp_path: Path, ray_cluster: RaySession
) -> Iterator[Driven]:
    lr = {"log": [1e-4, 1e-2]}
    recipe = write_recipe(
        tmp_path,
        model_folder,
        data_folder,
        method={"type": "lora"},
        train={
            "steps": {"choice": [8, ENDLESS]},
            "batch_size": 4,
            "report_every": 4,
            "lr": lr,
        },
        search={
            "trials": 4,
            "points": [
                {"train.steps": ENDLESS, "train.lr": 1e-3},
                {"train.steps": 8, "train.lr": 1e-3},
                {"train.steps": ENDLESS, "train.lr": 2e-3},
            ],
            "scheduler": {"type": "none"},
            "pack_slots": 2,
            "eval_rows": 4,
        },
    )
    search = Driven(recipe, tmp_path / "home", ray_cluster.address)
    yield search
    search.process.kill()
    search.process.wait()


@pytest.mark.slow
def test_trials_are_stopped_cloned_and_resumed_from_outside_and_the_search_ended(
    driven: Driven,
) -> None:
    home = driven.home
    driven.wait_until(lambda: bool(driven.reported(0) and driven.reported(2)))
    cloned = clone("tiny", 1, ["train.lr=0.005"], home=home)
    assert (cloned.is_done, cloned.trial) == (True, 3)
    assert stop("tiny", 0, home=home).is_done
    assert driven.told(0) == ("stopped", STOPPED_BY_PERSON)
    # Its slot is the clone's now.
    driven.wait_until(lambda: driven.told(3)[0] == "complete")
    params = show_study("tiny", home=home).trials[3].params
    assert params == {"train/steps": 8, "train/lr": 0.005}
    steps = driven.reported(0)[-1]
    assert resume("tiny", 0, home=home).trial == 4
    driven.wait_until(lambda: bool(driven.reported(4)))
    assert driven.reported(4)[0] in (steps + 4, steps + 8)  # one may have been on its way
    ended = stop("tiny", home=home)
    assert "half-trained ones keep their checkpoints (trial 2, 4)" in ended.words
    assert ended.resume_command is not None
    _, words = driven.process.communicate(timeout=240)
    assert driven.process.returncode == 130, words
    assert "a person stopped study 'tiny': 2 of 4 trials have ended" in words
    for number in (2, 4):
        assert stop("tiny", number, home=home).is_done  # nobody runs it: at once
    result = tune(load_recipe(driven.recipe), home=home)
    assert [(t.number, t.state) for t in result.trials] == [
        (1, "complete"),
        (2, "stopped"),
        (3, "complete"),
        (4, "stopped"),
    ]
    assert result.best.number in (1, 3)
