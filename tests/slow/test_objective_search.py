"""Packed searches over objectives, one of which samples, and over a mixture of sources."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from graft.engine.run import load_run, train_run
from graft.engine.run_folder import read_reports
from graft.pipelines.tune import TuneResult, tune
from graft.recipe.load import load_recipe
from graft.runtime.session import ray_session
from graft.testing import tiny_rows
from tests.ray.test_search import pytestmark as of_search
from tests.ray.test_search import write_recipe

pytestmark = [*of_search, pytest.mark.slow, pytest.mark.timeout(900)]

DPO = {"type": "dpo", "beta": {"log": [0.05, 0.5]}}
GRPO = {
    "type": "grpo",
    "rewards": [{"metric": "exact_match"}, {"metric": {"type": "length", "max_chars": 8}}],
    "group_size": 3,
    "max_new_tokens": 8,
    "num_iterations": 2,
}
TRAIN = {"steps": 8, "batch_size": 6, "report_every": 4, "lr": {"log": [1e-3, 1e-2]}}
OF_CLOCKS = frozenset({"seconds", "train/tokens_per_s", "rollout/seconds_fraction"})


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def pairs_folder(tmp_path: Path) -> Path:
    """Right answers of the tiny task against a wrong one, as `train.jsonl` and `eval.jsonl`."""
    rows = [
        {
            "prompt": row["messages"][:1],
            "chosen": row["messages"][1:],
            "rejected": [{"role": "assistant", "content": "horn=0"}],
        }
        for row in tiny_rows(200)[150:]
        if row["messages"][1]["content"] != "horn=0"
    ]
    write_rows(tmp_path / "pairs" / "train.jsonl", rows[:32])
    write_rows(tmp_path / "pairs" / "eval.jsonl", rows[32:])
    return tmp_path / "pairs"


def search_for(metric: str, kinds: list[str]) -> dict[str, Any]:
    """A search without early ends, so that every trial can be compared with itself alone."""
    return {
        "trials": 4,
        "pack_slots": 4,
        "points": [{"objective": kind} for kind in kinds],
        "sampler": "random",
        "scheduler": {"type": "none"},
        "eval_rows": 9,
        "objectives": [{"metric": metric, "mode": "max"}],
    }


def searched(recipe: Path, home: Path) -> TuneResult:
    with ray_session(num_cpus=2):
        result = tune(load_recipe(recipe), home=home)
    ends = [(trial.state, trial.executor, trial.steps) for trial in result.trials]
    assert ends == [("complete", "packed", 8)] * 4, [trial.reason for trial in result.trials]
    return result


def assert_each_went_as_alone(result: TuneResult, recipe: Path, home: Path) -> None:
    """Trains every trial's recipe in this process and compares each figure of each report."""
    space = load_recipe(recipe)
    for trial in result.trials:
        folder = home / f"alone-{trial.number}"
        train_run(load_run(space.fix(trial.params), home), folder, home=home, eval_rows=9)
        reports = read_reports(Path(result.folder) / "trials" / str(trial.number))
        for report, alone in zip(reports, read_reports(folder), strict=True):
            assert report.keys() == alone.keys()
            for name in report.keys() - OF_CLOCKS:
                assert report[name] == pytest.approx(alone[name], rel=1e-3, abs=1e-4), name


def test_objectives_with_and_without_rollouts_are_searched_in_one_pack(
    model_folder: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    metric, kinds = "eval/preference_accuracy", ["dpo", "orpo", "grpo"]
    recipe = write_recipe(
        tmp_path,
        model_folder,
        pairs_folder,
        method={"type": "lora", "r": 4},
        objective={"choice": [DPO, "orpo", GRPO]},
        train=TRAIN,
        search=search_for(metric, kinds),
        eval={"metrics": ["preference_accuracy", "exact_match", "loss"], "max_new_tokens": 8},
    )
    result = searched(recipe, tmp_path / "home")
    assert [trial.params["objective"] for trial in result.trials[:3]] == kinds
    dpo, orpo, grpo = (trial.metrics.keys() for trial in result.trials[:3])
    assert "objective/reward_accuracy" in dpo & orpo
    assert {"objective/reward", "rollout/exact_match"} <= grpo - dpo - orpo
    assert result.best.metrics[metric] == max(trial.metrics[metric] for trial in result.trials)
    assert result.metrics.keys() == {metric, "eval/exact_match", "eval/loss"}
    assert_each_went_as_alone(result, recipe, tmp_path / "home")


def test_a_mixture_is_searched_in_a_pack_for_the_metric_of_one_source(
    model_folder: Path, data_folder: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    texts = [{"text": f"the lamp of room {number} is blue"} for number in range(40)]
    commands = {"train": f"{data_folder}/train.jsonl", "eval": f"{data_folder}/eval.jsonl"}
    rooms = {
        "train": write_rows(tmp_path / "rooms.jsonl", texts[:30]),
        "eval": write_rows(tmp_path / "rooms_eval.jsonl", texts[30:]),
    }
    taste = {"train": f"{pairs_folder}/train.jsonl", "eval": f"{pairs_folder}/eval.jsonl"}
    metric, kinds = "eval/taste/preference_accuracy", ["dpo", "orpo"]
    recipe = write_recipe(
        tmp_path,
        model_folder,
        data_folder,
        data={
            "sources": [
                {"name": "commands", **commands, "objective": {"type": "sft"}, "weight": 2},
                {"name": "rooms", **rooms, "objective": {"type": "pretrain"}, "max_length": 64},
                {"name": "taste", **taste},
            ]
        },
        objective={"choice": [DPO, "orpo"]},
        train=TRAIN,
        search=search_for(metric, kinds),
        eval={"metrics": ["loss", "preference_accuracy"]},
    )
    result = searched(recipe, tmp_path / "home")
    assert [trial.params["objective"] for trial in result.trials[:2]] == kinds
    parts = ("commands", "rooms", "taste")
    told = {f"{area}/{part}/loss" for area in ("objective", "eval") for part in parts}
    assert all(told <= trial.metrics.keys() for trial in result.trials)
    assert result.best.metrics[metric] == max(trial.metrics[metric] for trial in result.trials)
    assert {metric, *(f"eval/{part}/loss" for part in parts)} <= result.metrics.keys()
    assert_each_went_as_alone(result, recipe, tmp_path / "home")
