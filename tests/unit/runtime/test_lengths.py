"""Tokens of a trial: as they are foretold from its rows, and as its reports count them."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from graft.engine.order import batch_rows
from graft.engine.run import load_run, train_run
from graft.engine.run_folder import read_reports
from graft.recipe.load import load_recipe, to_yaml
from graft.recipe.space import RecipeSpace
from graft.runtime.lengths import most_steps, training_rows, trial_tokens


@pytest.fixture
def space_of(model_folder: Path, data_folder: Path, tmp_path: Path) -> Any:
    def make(**sections: Any) -> RecipeSpace:
        content: dict[str, Any] = {
            "model": {"source": str(model_folder), "dtype": "fp32", "device": "cpu"},
            "data": {
                "train": str(data_folder / "train.jsonl"),
                "eval": str(data_folder / "eval.jsonl"),
                "max_length": 64,
            },
            "method": {"type": "lora", "r": 2},
            "train": {"steps": 5, "batch_size": 3, "report_every": 2, "seed": 7},
            "eval": {"metrics": ["loss"]},
            **sections,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(to_yaml(content))
        return load_recipe(path)

    return make


def test_reports_count_the_tokens_of_every_row_that_was_trained_on(
    space_of: Any, tmp_path: Path
) -> None:
    recipe = space_of().recipe()
    train_run(load_run(recipe, tmp_path), tmp_path / "run", home=tmp_path)
    lengths = [len(row.input_ids) for row in training_rows(recipe, tmp_path)]
    assert len(set(lengths)) > 1
    taken = [sum(lengths[i] for i in batch_rows(7, step, 3, len(lengths))) for step in range(5)]
    told = {report["steps"]: report["tokens"] for report in read_reports(tmp_path / "run")}
    assert told == {2: sum(taken[:2]), 4: sum(taken[:4]), 5: sum(taken)}
    assert trial_tokens(space_of(), tmp_path).fewest <= told[5]


def test_the_shortest_and_the_longest_trial_are_those_of_fewest_and_of_most_rows(
    space_of: Any, tmp_path: Path
) -> None:
    train = {"steps": {"choice": [4, 10]}, "batch_size": {"int": [2, 6]}, "report_every": 3}
    space = space_of(train=train)
    lengths = [len(row.input_ids) for row in training_rows(space.example(), tmp_path)]
    assert most_steps(space) == 10
    found = trial_tokens(space, tmp_path)
    assert found.fewest == 4 * 2 * min(lengths)
    assert found.most == round(10 * 6 * fmean(lengths))
    early = trial_tokens(space_of(train={**train, "stop_at_loss": 0.1}), tmp_path)
    assert early.fewest == 3 * 2 * min(lengths)


def test_sampled_answers_are_as_short_as_they_can_be_or_as_long_as_they_may(
    space_of: Any, tmp_path: Path
) -> None:
    objective = {
        "type": "grpo",
        "group_size": 2,
        "max_new_tokens": 8,
        "rewards": [{"metric": {"type": "length", "max_chars": 100}}],
    }
    space = space_of(objective=objective)
    prompts = [row.num_prompt_tokens for row in training_rows(space.example(), tmp_path)]
    found = trial_tokens(space, tmp_path)
    assert found.fewest == 5 * 3 * (min(prompts) + 2)
    assert found.most == round(5 * 3 * (fmean(prompts) + 2 * 8))
