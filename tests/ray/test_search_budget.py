"""A token budget that ends a search in mid-trial, and a larger one that goes on with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from graft.artifacts import Store
from graft.engine.checkpoint import newest_step
from graft.engine.run_folder import CHECKPOINTS, read_reports
from graft.pipelines.tune import TuneResult, plan_tune, tune
from graft.recipe.load import load_recipe
from graft.runtime.lengths import trial_tokens
from tests.ray.test_search import pytestmark as of_search
from tests.ray.test_search import write_recipe

pytestmark = of_search


def reports_of(result: TuneResult, number: int) -> list[dict[str, float]]:
    return read_reports(Path(result.folder) / "trials" / str(number))


def test_a_token_budget_ends_a_search_and_a_larger_one_goes_on(
    model_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(
        tmp_path,
        model_folder,
        data_folder,
        search={"trials": 4, "pack_slots": 2, "eval_rows": 8, "scheduler": {"type": "none"}},
    )
    home = tmp_path / "home"
    budget = round(2.4 * trial_tokens(load_recipe(recipe), home).most)
    tight = load_recipe(recipe, [f"search.max_tokens={budget}"])

    ended = tune(tight, home=home)
    assert ended.ended_by == "search.max_tokens"
    assert [trial.state for trial in ended.trials] == ["complete"] * 2 + ["paused"] * 2
    assert budget <= ended.spending.tokens < 1.25 * budget
    assert ended.spending.tokens == sum(trial.tokens for trial in ended.trials)
    assert ended.spending.hours > 0
    for trial in ended.trials[2:]:
        folder = Path(ended.folder) / "trials" / str(trial.number)
        assert newest_step(folder / CHECKPOINTS) == trial.steps > 0
        assert "search.max_tokens is spent" in str(trial.reason)
    assert Store(home).open(ended.artifact).record.metrics["eval/loss"].rows == 24

    again = tune(tight, home=home)
    assert (again.num_run, again.artifact, again.trials) == (0, ended.artifact, ended.trials)
    larger = load_recipe(recipe, [f"search.max_tokens={10 * budget}"])
    assert plan_tune(larger, home=home).spending.tokens == ended.spending.tokens

    whole = tune(larger, home=home)
    assert whole.ended_by == "search.trials"
    assert [trial.state for trial in whole.trials] == ["complete"] * 4
    assert whole.trials[:2] == ended.trials[:2]
    assert whole.spending.hours > ended.spending.hours
    for trial in whole.trials:
        reports = reports_of(whole, trial.number)
        assert [report["steps"] for report in reports] == [4, 8, 12, 16]
        assert trial.tokens == reports[-1]["tokens"]
    # One seed, one order of rows: every trial has trained on the same ones.
    assert len({trial.tokens for trial in whole.trials}) == 1


@pytest.mark.slow
def test_trials_with_workers_of_their_own_are_paused_and_go_on_too(
    model_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    search = {"trials": 3, "executor": "dedicated", "eval_rows": 8, "scheduler": {"type": "none"}}
    recipe = write_recipe(tmp_path, model_folder, data_folder, search=search)
    home = tmp_path / "home"
    budget = round(2.2 * trial_tokens(load_recipe(recipe), home).most)
    ended = tune(load_recipe(recipe, [f"search.max_tokens={budget}"]), home=home)
    assert ended.ended_by == "search.max_tokens"
    assert ended.best.state == "complete"
    paused = [trial for trial in ended.trials if trial.state == "paused"]
    assert paused
    for trial in paused:
        folder = Path(ended.folder) / "trials" / str(trial.number)
        assert newest_step(folder / CHECKPOINTS) >= trial.steps > 0
    whole = tune(load_recipe(recipe), home=home)
    assert [(trial.state, trial.executor) for trial in whole.trials] == [
        ("complete", "dedicated")
    ] * 3
    for trial in whole.trials:
        assert [r["steps"] for r in reports_of(whole, trial.number)] == [4, 8, 12, 16]
    assert len({trial.tokens for trial in whole.trials}) == 1
