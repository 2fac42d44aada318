"""A pack that dies in mid-search: its trials go on from their checkpoints in another one."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util import list_named_actors

from graft.core.events import read_events
from graft.engine.run import load_run, train_run
from graft.engine.run_folder import read_reports
from graft.pipelines.tune import TuneResult, tune
from graft.recipe.load import load_recipe
from tests.ray.test_search import pytestmark as of_search
from tests.ray.test_search import write_recipe
from tests.ray.test_search_resume import ends

pytestmark = of_search

LRS = [1e-4, 3e-3, 1e-3, 5e-4]
REPORTS = list(range(4, 25, 4))


def reported(events: list[dict[str, Any]], trial: int) -> list[int]:
    return [e["steps"] for e in events if e["event"] == "report" and e["trial"] == trial]


def kill_pack(events: Path, seen: list[dict[str, Any]], waits: threading.Event) -> None:
    """Kills the pack once a trial has ended and each of two others has reported since."""
    while waits.is_set():
        found = read_events(events)
        if ends(found):
            last_end = max(at for at, event in enumerate(found) if event["event"] == "end")
            since = {e["trial"] for e in found[last_end:] if e["event"] == "report"}
            if len(since) == 2:
                break
        time.sleep(0.02)
    (name,) = [
        actor
        for actor in list_named_actors(all_namespaces=True)
        if actor["name"].startswith("graft-pack-")
    ]
    ray.kill(ray.get_actor(name["name"], namespace=name["namespace"]))
    seen += read_events(events)


@pytest.fixture(scope="module")
def killed(
    model_folder: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TuneResult, Path, list[dict[str, Any]], list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("pack-killed")
    path = write_recipe(
        folder,
        model_folder,
        data_folder,
        model={"source": str(model_folder), "dtype": "fp64", "device": "cpu"},
        method={"type": "lora", "r": 4, "lora_dropout": 0.1},
        train={
            "steps": REPORTS[-1],
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
    home = folder / "home"
    events, seen = home / "studies" / "tiny" / "events.jsonl", list[dict[str, Any]]()
    waits = threading.Event()
    waits.set()
    killer = threading.Thread(target=kill_pack, args=(events, seen, waits))
    killer.start()
    try:
        result = tune(load_recipe(path), home=home)
    finally:
        waits.clear()
        killer.join()
    return result, path, seen, read_events(events)


def test_no_trial_of_a_killed_pack_is_lost_or_run_twice(
    killed: tuple[TuneResult, Path, list[dict[str, Any]], list[dict[str, Any]]],
) -> None:
    result, _, seen, events = killed
    assert 0 < len(ends(seen)) < len(LRS)
    assert sorted(ends(events)) == [trial.number for trial in result.trials] == [0, 1, 2, 3]
    assert {trial.state for trial in result.trials} == {"complete"}


def test_they_go_on_from_their_checkpoints(
    killed: tuple[TuneResult, Path, list[dict[str, Any]], list[dict[str, Any]]],
) -> None:
    result, _, seen, events = killed
    later = events[len(seen) :]
    interrupted = {e["trial"] for e in seen if e["event"] == "start"} - set(ends(seen))
    assert len(interrupted) == 2
    for trial in result.trials:
        assert list(trial.reports) == REPORTS
        told = reported(events, trial.number)
        assert told == sorted(set(told))
        if trial.number in interrupted:
            before, after = (reported(part, trial.number) for part in (seen, later))
            assert min(after) > max(before) >= REPORTS[0]


def test_their_results_are_those_of_the_same_trials_alone(
    killed: tuple[TuneResult, Path, list[dict[str, Any]], list[dict[str, Any]]], tmp_path: Path
) -> None:
    result, path, _, _ = killed
    for trial, lr in zip(result.trials, LRS, strict=True):
        assert trial.params["train/lr"] == lr
        alone, folder = load_recipe(path, [f"train.lr={lr}"]).example(), tmp_path / str(lr)
        run = load_run(alone, tmp_path / "home")
        assert train_run(run, folder, home=tmp_path / "home", eval_rows=8)
        expected = {int(report["steps"]): report["eval/loss"] for report in read_reports(folder)}
        assert trial.reports == pytest.approx(expected, abs=1e-6)
