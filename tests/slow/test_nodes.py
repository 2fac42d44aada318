"""Several nodes: a worker dies, a node does or says that it will; nothing else changes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from graft.core.events import read_events
from graft.engine.run import load_run, train_run
from graft.engine.run_folder import read_reports
from graft.pipelines.tune import TuneResult, tune
from graft.recipe.load import load_recipe
from graft.recipe.sections import Recipe
from graft.runtime.session import ray_session
from tests.ray.test_search import write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = 150


def recipe_for(model_folder: Path, data_folder: Path, workers: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"source": str(model_folder), "dtype": "fp32"},
            "data": {"train": str(data_folder / "train.jsonl")},
            "method": {"type": "lora", "r": 4, "lora_dropout": 0.1},
            "train": {
                "steps": STEPS,
                "batch_size": 24,
                "lr": 1e-3,
                "micro_batch_tokens": 60,
                "report_every": 1,
            },
            "scale": {"workers": workers, "zero_stage": 2, "threads": 1},
        }
    )


@pytest.fixture(scope="module")
def alone(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path, data_folder: Path
) -> list[float]:
    """Losses of one process that nobody disturbs."""
    folder = tmp_path_factory.mktemp("alone")
    recipe = recipe_for(model_folder, data_folder, workers=1)
    train_run(load_run(recipe, folder), folder / "run", home=folder)
    return losses(folder / "run")


def losses(folder: Path) -> list[float]:
    """Of every step, which is reported once."""
    reports = read_reports(folder)
    assert [report["steps"] for report in reports] == list(range(1, STEPS + 1))
    return [report["train/loss"] for report in reports]


def played(scenario: str, recipe: Path, folder: Path) -> dict[str, Any]:
    """Plays a scenario on a cluster of its own; returns what happened there."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.slow.nodes_driver", scenario, str(recipe), str(folder)],
        env={**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    facts: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    print(scenario, {name: fact for name, fact in facts.items() if name != "result"})
    return facts


@pytest.mark.parametrize(
    ("scenario", "workers", "expected"),
    [
        ("nothing", 2, {"nodes": 2}),
        ("worker", 2, {}),
        ("node", [1, 2], {"workers_after_loss": 1, "workers_after_return": 2}),
        ("notice", [1, 2], {"workers_after_loss": 1}),
    ],
)
def test_a_run_on_two_nodes_loses_as_one_process_does(
    scenario: str,
    workers: Any,
    expected: dict[str, int],
    tmp_path: Path,
    model_folder: Path,
    data_folder: Path,
    alone: list[float],
) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(recipe_for(model_folder, data_folder, workers).model_dump_json())
    facts = played(scenario, path, tmp_path)
    assert facts["steps"] == STEPS
    assert facts.items() >= expected.items()
    assert losses(tmp_path / "run") == pytest.approx(alone, abs=1e-3)
    assert alone[-1] < alone[0]


RANKS = (2, 4, 8, 16)


def search_recipe(folder: Path, model_folder: Path, data_folder: Path) -> Path:
    return write_recipe(
        folder,
        model_folder,
        data_folder,
        method={"type": "lora", "r": {"choice": list(RANKS)}},
        train={"steps": 80, "batch_size": 16, "lr": 1e-3, "report_every": 10},
        scale={"threads": 1},
        search={
            "trials": len(RANKS),
            "points": [{"method/r": rank} for rank in RANKS],
            "scheduler": {"type": "none"},
            "pack_slots": 2,
            "eval_rows": 8,
        },
    )


@pytest.fixture(scope="module")
def searched_on_one_node(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path, data_folder: Path
) -> TuneResult:
    folder = tmp_path_factory.mktemp("one-node")
    recipe = search_recipe(folder, model_folder, data_folder)
    with ray_session(num_cpus=2):
        return tune(load_recipe(recipe), home=folder / "home")


@pytest.mark.parametrize("scenario", ["search", "search-node"])
def test_a_search_has_a_pack_on_every_node_and_outlives_one(
    scenario: str,
    tmp_path: Path,
    model_folder: Path,
    data_folder: Path,
    searched_on_one_node: TuneResult,
) -> None:
    recipe = search_recipe(tmp_path, model_folder, data_folder)
    facts = played(scenario, recipe, tmp_path / "home")
    assert facts["pack_nodes"] == 2
    result = TuneResult.model_validate_json(facts["result"])
    assert [trial.state for trial in result.trials] == ["complete"] * len(RANKS)
    assert result.num_run == len(RANKS)
    events = read_events(Path(result.folder) / "events.jsonl")
    starts = sum(event["event"] == "start" for event in events)
    assert (starts > len(RANKS)) == (scenario == "search-node")
    for found, expected in zip(result.trials, searched_on_one_node.trials, strict=True):
        assert found.params == expected.params
        assert found.metrics["eval/loss"] == pytest.approx(expected.metrics["eval/loss"], abs=1e-3)


def dedicated_recipe(folder: Path, model_folder: Path, data_folder: Path, workers: int) -> Path:
    count = 2 // workers
    return write_recipe(
        folder,
        model_folder,
        data_folder,
        method={"type": "lora", "r": {"choice": list(RANKS)}},
        train={
            "steps": STEPS,
            "batch_size": 24,
            "lr": 1e-3,
            "micro_batch_tokens": 60,
            "report_every": 5,
        },
        scale={"workers": workers, "threads": 1},
        search={
            "trials": count,
            "points": [{"method/r": rank} for rank in RANKS[:count]],
            "executor": "dedicated",
            "eval_rows": 8,
        },
    )


@pytest.mark.parametrize(("scenario", "workers"), [("search-dedicated", 1), ("search-shrunk", 2)])
def test_a_dedicated_trial_outlives_the_node_of_its_workers(
    scenario: str, workers: int, tmp_path: Path, model_folder: Path, data_folder: Path
) -> None:
    """What is left has room for it in the first scenario, and not before a node comes back in the
    second: there the search ends in words, and the same command goes on."""
    recipe = dedicated_recipe(tmp_path, model_folder, data_folder, workers)
    facts = played(scenario, recipe, tmp_path / "home")
    result = TuneResult.model_validate_json(facts["result"])
    steps = list(range(5, STEPS + 1, 5))
    events = read_events(Path(result.folder) / "events.jsonl")
    for trial in result.trials:
        told = [e["steps"] for e in events if e["event"] == "report" and e["trial"] == trial.number]
        assert told == sorted(set(told)), "each step is counted once"
        assert trial.state in ("complete", "stopped")
        assert list(trial.reports) == steps[: len(trial.reports)]
    assert any(trial.state == "complete" for trial in result.trials)
    said = [event["words"] for event in events if event["event"] == "note"]
    assert any("going on from step" in words for words in said)
    starts = sum(event["event"] == "start" for event in events)
    if scenario == "search-dedicated":
        assert starts == len(result.trials)
    else:
        assert starts > len(result.trials)
        assert "trial 0: scale.workers is 2 and the Ray cluster has 1 CPUs" in facts["refused"]
        assert "The checkpoints are kept" in facts["refused"]
