"""Budgets of a study: hours and tokens over all its drivers, and what waits for larger ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import FIFOScheduler

from graft.core.errors import ConfigError, TrainingError
from graft.engine.run_folder import CHECKPOINTS
from graft.pipelines.tune import plan_tune, tune
from graft.recipe.load import load_recipe, to_yaml
from graft.recipe.space import RecipeSpace
from graft.runtime.budget import Budget, read_spending
from graft.runtime.scheduler import BudgetScheduler, StudyScheduler
from graft.runtime.searcher import StudySearcher, TrialQueue
from graft.runtime.study import Study, open_study
from graft.runtime.trials import StudyFacts

FACTS = StudyFacts(
    space="space", model="model", data="data", objectives=("eval/loss min",), eval_rows=4
)


@pytest.fixture
def recipe(model_folder: Path, data_folder: Path, tmp_path: Path) -> Path:
    content: dict[str, Any] = {
        "name": "tiny",
        "model": {"source": str(model_folder), "dtype": "fp32", "device": "cpu"},
        "data": {
            "train": str(data_folder / "train.jsonl"),
            "eval": str(data_folder / "eval.jsonl"),
            "max_length": 64,
        },
        "method": {"type": "lora", "r": {"choice": [2, 4, 8]}},
        "train": {"steps": 8, "batch_size": 2, "report_every": 4},
        "search": {"trials": 4, "sampler": "random", "eval_rows": 4, "scheduler": {"type": "none"}},
        "eval": {"metrics": ["loss"]},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(content))
    return path


class Driver:
    """Does with scheduler and searcher what Tune does with a report, in its order."""

    def __init__(self, study: Study, space: RecipeSpace, longest: int = 8) -> None:
        self.study = study
        self.queue = TrialQueue(study, space, turn=4)
        self.searcher = StudySearcher(self.queue, "packed")
        section, within = study.section, FIFOScheduler()
        if section.scheduler.type == "asha":
            within = StudyScheduler(section.scheduler, section.objectives, longest, {})
        self.scheduler = BudgetScheduler(within, self.queue.budget)

    def begin(self, trial_id: str) -> Any:
        config = self.searcher.suggest(trial_id)
        assert isinstance(config, dict)
        trial = SimpleNamespace(trial_id=trial_id, config=config)
        self.scheduler.on_trial_add(None, trial)
        return trial

    def report(self, trial: Any, steps: int, tokens: int, loss: float = 1.0) -> bool:
        """Returns whether the trial goes on."""
        said = {"steps": steps, "seconds": 1.0, "tokens": tokens, "eval/loss": loss}
        is_done = steps >= trial.config["steps"]
        decision = "STOP" if is_done else self.scheduler.on_trial_result(None, trial, said)
        if decision == "STOP":
            self.scheduler.on_trial_complete(None, trial, said)
            self.searcher.on_trial_complete(trial.trial_id, said)
        else:
            self.searcher.on_trial_result(trial.trial_id, said)
        return decision != "STOP"

    def number(self, trial: Any) -> int:
        return int(trial.config["trial"])


@contextmanager
def driven(folder: Path, recipe: Path, *overrides: str) -> Iterator[Driver]:
    space = load_recipe(recipe, overrides)
    with open_study(folder / "study", space.sections().search, FACTS) as study:
        yield Driver(study, space)


def checkpoint(study: Study, number: int) -> Path:
    kept = study.trial_folder(number) / CHECKPOINTS / "step-00000004"
    kept.mkdir(parents=True)
    return kept


def test_a_spent_token_budget_pauses_what_runs_and_begins_nothing_more(
    recipe: Path, tmp_path: Path
) -> None:
    with driven(tmp_path, recipe, "search.max_tokens=1000") as driver:
        study = driver.study
        first, second = driver.begin("a"), driver.begin("b")
        kept = checkpoint(study, driver.number(second))
        assert driver.report(first, 4, 300)
        assert driver.report(second, 4, 300)
        assert not driver.report(first, 8, 700)
        assert driver.queue.budget.spent == "search.max_tokens"
        assert not driver.report(second, 5, 310)
        assert driver.searcher.suggest("c") == "FINISHED"
        assert driver.queue.turn_of() is None
        assert [trial.state for trial in study.trials] == ["complete", "paused"]
        assert "search.max_tokens is spent" in str(study.trial(1).reason)
        assert study.best().number == 0
        assert kept.exists(), "an ended trial's checkpoint goes, a paused one's stays"
        spending = driver.queue.budget.spending
        assert (spending.tokens, spending.num_ended) == (1010, 1)
        assert driver.queue.budget.ended_by == "search.max_tokens"


def test_a_larger_token_budget_takes_up_what_was_paused(recipe: Path, tmp_path: Path) -> None:
    with driven(tmp_path, recipe, "search.max_tokens=500") as driver:
        paused, unbegun = driver.begin("a"), driver.begin("b")
        assert not driver.report(paused, 4, 500)
        driver.queue.budget.pause_rest()
        assert [trial.state for trial in driver.study.trials] == ["paused", "paused"]
        numbers = [driver.number(paused), driver.number(unbegun)]
        with pytest.raises(TrainingError, match=r"search\.max_tokens is spent; a larger one goes"):
            driver.study.best()
    with driven(tmp_path, recipe, "search.max_tokens=5000") as driver:
        assert driver.queue.budget.spent is None
        assert driver.queue.num_resumed == 2
        again = [driver.begin("c"), driver.begin("d")]
        assert [driver.number(trial) for trial in again] == numbers
        assert {trial.state for trial in driver.study.trials} == {"running"}
        assert driver.study.trial(0).reason is None
        for trial in again:
            driver.report(trial, 8, 1000)
        for name in ("e", "f"):
            driver.report(driver.begin(name), 8, 1000)
        assert [trial.state for trial in driver.study.trials] == ["complete"] * 4
        assert [trial.tokens for trial in driver.study.trials] == [1000] * 4
        assert driver.queue.budget.ended_by == "search.trials"


def test_a_trial_that_ends_before_its_first_report_here_has_spent_what_it_had(
    recipe: Path, tmp_path: Path
) -> None:
    with driven(tmp_path, recipe) as driver:
        driver.report(driver.begin("a"), 4, 300)
    with driven(tmp_path, recipe) as driver:
        trial = driver.begin("b")
        driver.scheduler.on_trial_complete(None, trial, {"done": True})  # as Tune fills it in
        assert driver.queue.budget.spending.tokens == 300


def test_what_the_rungs_give_up_is_stopped_for_good_though_the_budget_is_spent(
    recipe: Path, tmp_path: Path
) -> None:
    asha = "search.scheduler={type: asha, grace_steps: 4}"
    with driven(tmp_path, recipe, asha, "search.max_tokens=900") as driver:
        good, bad, late = driver.begin("a"), driver.begin("b"), driver.begin("c")
        assert driver.report(good, 4, 400, loss=0.2)
        assert not driver.report(bad, 4, 600, loss=0.9)
        assert not driver.report(late, 4, 400, loss=0.1)
        assert not driver.report(good, 5, 450, loss=0.2)
        assert [trial.state for trial in driver.study.trials] == ["paused", "stopped", "paused"]


def test_hours_are_counted_over_all_drivers(recipe: Path, tmp_path: Path) -> None:
    with driven(tmp_path, recipe, "search.max_hours=2") as driver:
        assert driver.queue.budget.spent is None
        driver.queue.budget.keep()
        assert 0 < driver.study.seconds < 60
        driver.study.keep_seconds(7199.0)
    with driven(tmp_path, recipe, "search.max_hours=2") as driver:
        trial = driver.begin("a")
        assert driver.report(trial, 4, 100)
        driver.study.keep_seconds(7200.0)
    with driven(tmp_path, recipe, "search.max_hours=2") as driver:
        assert driver.queue.budget.spent == "search.max_hours"
        assert driver.searcher.suggest("b") == "FINISHED"
    with driven(tmp_path, recipe, "search.max_hours=3") as driver:
        again = driver.begin("a")
        assert driver.number(again) == driver.number(trial)
        budget = driver.queue.budget
        assert budget.spending.hours == pytest.approx(2.0, abs=0.02)
        assert "1 hours" in budget.spending.left


def test_a_dry_run_tells_what_is_spent_and_left(recipe: Path, tmp_path: Path) -> None:
    overrides = ["search.max_tokens=1000", "search.max_hours=1.5"]
    space = load_recipe(recipe, overrides)
    fresh = plan_tune(space, home=tmp_path).spending
    assert fresh.words == "0 of 4 trials, 0 of 1.5 hours, 0 of 1,000 tokens"
    folder = tmp_path / "studies" / "tiny"
    folder.parent.mkdir()
    with open_study(folder, space.sections().search, FACTS) as study:
        driver = Driver(study, space)
        driver.report(driver.begin("a"), 8, 640)
        study.keep_seconds(1800.0)
    spent = plan_tune(space, home=tmp_path).spending
    assert (spent.num_ended, spent.tokens) == (1, 640)
    assert spent.left == "3 trials, 1 hours, 360 tokens"
    unbounded = read_spending(folder, load_recipe(recipe).sections().search)
    assert (unbounded.left, unbounded.tokens) == ("3 trials", 640)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("search.max_tokens=10", r"search\.max_tokens 10 allows no trial: .* at least; give so"),
        (
            "search.scheduler={type: asha, grace_tokens: 100000}",
            r"grace_tokens 100000 is beyond the longest trial of this space, about \d+ tokens",
        ),
    ],
)
def test_what_no_trial_comes_to_is_refused_before_anything_starts(
    recipe: Path, tmp_path: Path, override: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        tune(load_recipe(recipe, [override]), home=tmp_path / "home")
    assert not (tmp_path / "home" / "studies").exists()


def test_a_budget_that_is_read_only_counts_and_does_not_write(recipe: Path, tmp_path: Path) -> None:
    with driven(tmp_path, recipe) as driver:
        before = driver.study.seconds
        assert Budget(driver.study).spent is None
        assert driver.study.seconds == before
