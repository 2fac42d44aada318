"""A search whose best trials are trained again on fresh seeds: packed, killed half-way, resumed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from graft.artifacts import Store
from graft.core.events import read_events
from graft.pipelines.finals import finals_folder
from graft.pipelines.report import read_report, report
from graft.pipelines.study import stop
from graft.pipelines.tune import TuneResult, tune
from graft.recipe.load import load_recipe
from graft.recipe.seeds import SEED
from graft.report.finals_facts import Finals
from graft.runtime.session import RaySession
from graft.runtime.study import Study, read_study
from tests.ray.test_search import pytestmark as of_search
from tests.ray.test_search import write_recipe
from tests.ray.test_search_resume import DRIVER, LRS, ends

pytestmark = of_search

NUM_RERUNS = 6
"""Two finalists on three seeds."""


def write_search(
    folder: Path, model_folder: Path, data_folder: Path, name: str, steps: int = 16
) -> Path:
    """Three points; the best two are finalists."""
    folder.mkdir()
    return write_recipe(
        folder,
        model_folder,
        data_folder,
        name=name,
        method={"type": "lora", "r": 4},
        train={"steps": steps, "batch_size": 4, "report_every": 4, "lr": {"log": [1e-5, 1e-1]}},
        search={
            "trials": 3,
            "points": [{"train.lr": lr} for lr in LRS[:3]],
            "scheduler": {"type": "none"},
            "pack_slots": 3,
            "eval_rows": 8,
            "finalists": 2,
        },
    )


def reruns_of(home: Path, name: str) -> Study:
    folder = home / "studies" / name
    space = load_recipe(folder / "recipe.yaml")
    return read_study(finals_folder(folder), space.sections().search)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("finalists") / "home"


@pytest.fixture(scope="module")
def whole(
    home: Path, model_folder: Path, data_folder: Path, ray_cluster: RaySession
) -> tuple[Path, TuneResult]:
    """A search that nothing disturbed, and its recipe."""
    home.mkdir()
    recipe = write_search(home / "whole", model_folder, data_folder, "whole")
    return recipe, tune(load_recipe(recipe), home=home)


def finals_of(result: TuneResult) -> Finals:
    assert result.finals is not None
    return result.finals


def test_the_best_trials_are_trained_again_on_fresh_seeds_in_one_pack(
    home: Path, whole: tuple[Path, TuneResult]
) -> None:
    _, result = whole
    finals, reruns = finals_of(result), reruns_of(home, "whole").trials
    assert len(result.trials) == result.num_run == 3  # the budget knows no re-run
    assert len(reruns) == NUM_RERUNS
    assert {(t.state, t.executor, t.steps) for t in reruns} == {("complete", "packed", 16)}
    assert {(t.rerun_of, t.params[SEED]) for t in reruns} == {
        (finalist.number, seed) for finalist in finals.finalists for seed in (1, 2, 3)
    }
    ranked = sorted(result.trials, key=lambda t: t.metrics["eval/loss"])
    assert {f.number for f in finals.finalists} == {t.number for t in ranked[:2]}
    for finalist in finals.finalists:
        assert len(set(finalist.values)) == 3  # a seed changes what is learned
        assert finalist.low is not None
        assert finalist.low < min(finalist.mean or 0.0, *finalist.values)
    means = [finalist.mean or 0.0 for finalist in finals.finalists]
    assert means == sorted(means)
    assert result.best.number == finals.finalists[0].number


def test_the_run_nearest_to_the_mean_is_published_and_reported(
    home: Path, whole: tuple[Path, TuneResult]
) -> None:
    _, result = whole
    finals = finals_of(result)
    first = finals.finalists[0]
    nearest = min(first.reruns, key=lambda r: abs((r.value or 0.0) - (first.mean or 0.0)))
    assert finals.published_seed == nearest.seed
    stored = Store(home).open(result.artifact)
    assert stored.record.recipe["train"]["seed"] == nearest.seed
    assert stored.record.recipe["train"]["lr"] == first.params["train/lr"]
    facts = read_report(Path(report("whole", home=home).figures))
    assert facts.finals == finals
    assert f"seed: {nearest.seed}\n" in str(facts.chosen_recipe)


def test_a_finished_study_is_returned_and_more_seeds_train_those_alone(
    home: Path, whole: tuple[Path, TuneResult]
) -> None:
    recipe, result = whole
    again = tune(load_recipe(recipe), home=home)
    assert (again.artifact, again.finals) == (result.artifact, result.finals)
    more = finals_of(tune(load_recipe(recipe, ["search.finalist_seeds=4"]), home=home))
    assert more.seeds == (1, 2, 3, 4)
    assert len(reruns_of(home, "whole").trials) == NUM_RERUNS + 2
    values = {f.number: f.values[:3] for f in more.finalists}
    assert values == {f.number: f.values for f in finals_of(result).finalists}


def test_a_driver_killed_among_the_finalists_goes_on_with_them(
    home: Path,
    whole: tuple[Path, TuneResult],
    model_folder: Path,
    data_folder: Path,
    ray_cluster: RaySession,
) -> None:
    recipe = write_search(home / "killed", model_folder, data_folder, "killed")
    folder = home / "studies" / "killed"
    events = finals_folder(folder) / "events.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(recipe), str(home), ray_cluster.address],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline and process.poll() is None:
        if any(event["event"] == "end" for event in read_events(events)):
            break
        time.sleep(0.02)
    process.kill()
    process.wait()
    searched, ended = read_events(folder / "events.jsonl"), ends(read_events(events))
    assert 0 < len(ended) < NUM_RERUNS
    result = tune(load_recipe(recipe), home=home)
    assert result.num_run == 0
    assert read_events(folder / "events.jsonl") == searched  # no searched trial ran again
    assert sorted(ends(read_events(events))) == list(range(NUM_RERUNS))
    for one, other in zip(finals_of(result).finalists, finals_of(whole[1]).finalists, strict=True):
        assert one.params == other.params
        assert one.values == pytest.approx(other.values, rel=1e-4)


@pytest.mark.slow
def test_a_search_ended_among_its_finalists_goes_on_with_them(
    tmp_path: Path, model_folder: Path, data_folder: Path, ray_cluster: RaySession
) -> None:
    steps, home = 240, tmp_path / "home"
    recipe = write_search(tmp_path / "ended", model_folder, data_folder, "ended", steps)
    events = finals_folder(home / "studies" / "ended") / "events.jsonl"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "graft.cli", "tune", str(recipe)),
            *("--home", str(home), "--address", ray_cluster.address),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 400
        while not any(event["event"] == "report" for event in read_events(events)):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        change = stop("ended", home=home)
        assert change.is_done
        assert "of 6 re-runs have ended, half-trained ones keep their checkpoints" in change.words
        _, words = process.communicate(timeout=240)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, words
    reruns = reruns_of(home, "ended")
    left = {t.number: t.steps for t in reruns.trials if t.state == "running"}
    assert left
    seen = len(read_events(events))
    result = tune(load_recipe(recipe), home=home)
    assert result.num_run == 0
    assert len(finals_of(result).finalists) == 2
    assert [(t.state, t.steps) for t in reruns.trials] == [("complete", steps)] * NUM_RERUNS
    later = [e for e in read_events(events)[seen:] if e["event"] == "report"]
    first = {e["trial"]: e["steps"] for e in reversed(later)}
    assert all(first[number] >= steps_then for number, steps_then in left.items())  # not anew
