"""Packed trials and trials with two Ray Train workers under DeepSpeed, in one study."""

from __future__ import annotations

from pathlib import Path

import pytest

from graft.pipelines.tune import tune
from graft.recipe.load import load_recipe
from graft.runtime.session import ray_session
from tests.ray.test_search import pytestmark as of_search
from tests.ray.test_search import write_recipe

pytestmark = [*of_search, pytest.mark.slow, pytest.mark.timeout(600)]


def test_both_executors_take_turns_on_one_study(
    model_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(
        tmp_path,
        model_folder,
        data_folder,
        method={"type": "lora", "r": 4},
        train={"steps": 8, "batch_size": 4, "report_every": 4, "lr": 1e-3},
        scale={"workers": {"choice": [1, 2]}, "zero_stage": 0},
        search={
            "trials": 2,
            "points": [{"scale.workers": 1}, {"scale.workers": 2}],
            "sampler": "random",
            "scheduler": {"type": "none"},
            "eval_rows": 8,
        },
    )
    with ray_session(num_cpus=2):
        result = tune(load_recipe(recipe), home=tmp_path / "home")
    by_workers = {1: "packed", 2: "dedicated"}
    assert [t.executor for t in result.trials] == [
        by_workers[t.params["scale/workers"]] for t in result.trials
    ]
    assert {t.state for t in result.trials} == {"complete"}
    losses = [t.metrics["eval/loss"] for t in result.trials]
    assert losses == pytest.approx([losses[0]] * 2, rel=1e-3)


def test_the_workers_of_a_stopped_trial_make_room_for_the_next(
    model_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    rates = [5e-3, 1e-7, 1e-7]
    recipe = write_recipe(
        tmp_path,
        model_folder,
        data_folder,
        method={"type": "lora", "r": 4},
        train={
            "steps": 16,
            "batch_size": 4,
            "report_every": 4,
            "lr": {"log": [1e-7, 1e-2]},
        },
        scale={"workers": 2, "zero_stage": 2},
        search={
            "trials": len(rates),
            "points": [{"train/lr": rate} for rate in rates],
            "sampler": "random",
            "scheduler": {"type": "asha", "grace_steps": 4, "reduction_factor": 2},
            "eval_rows": 8,
        },
    )
    with ray_session(num_cpus=2):
        result = tune(load_recipe(recipe), home=tmp_path / "home")
    assert {t.executor for t in result.trials} == {"dedicated"}
    assert [t.reason for t in result.trials] == [None] * 3
    states = [t.state for t in result.trials]
    assert states == ["complete", "stopped", "stopped"]
