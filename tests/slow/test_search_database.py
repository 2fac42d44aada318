"""A search whose PostgreSQL server dies in mid-study: waited for, then gone on with."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from graft.core.events import read_events
from graft.core.progress import Progress
from graft.pipelines.tune import TuneResult, tune
from graft.recipe.load import load_recipe
from graft.runtime.session import ray_session
from tests.postgres import Server, missing, running_server
from tests.ray.test_search import pytestmark as of_search
from tests.ray.test_search import write_recipe

pytestmark = [
    *of_search,
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=missing() or "a server is here"),
]

LRS = [1e-4, 3e-3, 1e-3, 5e-4]
STEPS = list(range(4, 41, 4))


class Notes(Progress):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.text = ""

    def note(self, text: str) -> None:
        """Keeps a line."""
        self.text += f"{text}\n"


@pytest.fixture
def server() -> Iterator[Server]:
    with running_server() as running:
        yield running


def recipe_of(folder: Path, model_folder: Path, data_folder: Path, server: Server) -> Path:
    train = {"steps": STEPS[-1], "batch_size": 4, "report_every": 4, "lr": {"log": [1e-5, 1e-1]}}
    search = {
        "storage": server.socket_url,
        "trials": len(LRS),
        "points": [{"train.lr": lr} for lr in LRS],
        "scheduler": {"type": "none"},
        "pack_slots": 2,
        "eval_rows": 8,
    }
    method = {"type": "lora", "r": 4}
    return write_recipe(
        folder, model_folder, data_folder, method=method, train=train, search=search
    )


def after_reports(events: Path, count: int, do: Callable[[], None]) -> threading.Thread:
    """Does something once a search has come so far."""

    def wait() -> None:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            if sum(e["event"] == "report" for e in read_events(events)) >= count:
                do()
                return
            time.sleep(0.02)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def require_each_once(events: list[dict[str, Any]], result: TuneResult) -> None:
    """Every trial ended once, and every step of it was reported."""
    told = [e["trial"] for e in events if e["event"] == "end" and e["state"] == "complete"]
    assert sorted(told) == [t.number for t in result.trials] == list(range(len(LRS)))
    assert {t.state for t in result.trials} == {"complete"}
    assert [t.params["train/lr"] for t in result.trials] == LRS
    for trial in result.trials:
        assert sorted(trial.reports) == STEPS


def test_a_server_that_comes_back_is_waited_for(
    tmp_path: Path, model_folder: Path, data_folder: Path, server: Server
) -> None:
    recipe = recipe_of(tmp_path, model_folder, data_folder, server)
    events = tmp_path / "home" / "studies" / "tiny" / "events.jsonl"

    def restart() -> None:
        server.kill()
        threading.Event().wait(3)
        server.start()

    notes = Notes()
    thread = after_reports(events, 5, restart)
    with ray_session(num_cpus=2):
        result = tune(load_recipe(recipe), home=tmp_path / "home", progress=notes)
    thread.join()
    assert "waiting for it" in notes.text
    assert "answers again" in notes.text
    require_each_once(read_events(events), result)


def test_a_server_that_stays_away_ends_the_search_in_words_and_the_command_goes_on_later(
    tmp_path: Path, model_folder: Path, data_folder: Path, server: Server
) -> None:
    recipe = recipe_of(tmp_path, model_folder, data_folder, server)
    home = tmp_path / "home"
    events = home / "studies" / "tiny" / "events.jsonl"
    thread = after_reports(events, 5, server.kill)
    command = [sys.executable, "-m", "graft.cli", "tune", str(recipe), "--home", str(home)]
    ended = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    thread.join()
    assert ended.returncode == 1
    assert "fails, for 120 s now" in ended.stderr
    assert "the same command goes on" in ended.stderr
    assert list((home / "studies" / "tiny").glob("trials/*/checkpoint/step-*"))
    server.start()
    with ray_session(num_cpus=2):
        result = tune(load_recipe(recipe), home=home)
    require_each_once(read_events(events), result)
