"""The recipe of a renewal's search."""

from __future__ import annotations

from typing import Any

import pytest

from graft.core.spaces import Float
from graft.pipelines.renewal_data import RenewalData
from graft.pipelines.renewal_plan import derive_recipe
from graft.recipe.sections import Recipe
from graft.recipe.space import RecipeSpace
from graft.recipe.tree import Tree

CONTENT: dict[str, Any] = {
    "version": 1,
    "name": "house",
    "model": {"source": "org/model"},
    "data": {"train": "train.jsonl", "eval": "eval.jsonl", "system": "Be brief.", "limit": 7},
    "method": {"type": "lora", "r": 16},
    "train": {"steps": 200, "lr": 0.003},
    "search": {"trials": 30, "scheduler": {"type": "asha", "grace_steps": 50}, "sampler": "grid"},
    "loop": {"budget_trials": 5, "steps": 40},
}

DATA = RenewalData(
    train="/r/train.jsonl", search="/r/search.jsonl", num_new=1, num_old=1, num_search=1, sha256=""
)


def make_sections(content: dict[str, Any]) -> Any:
    return RecipeSpace(Tree("recipe.yaml", content)).sections()


def test_it_is_the_champions_recipe_open_in_the_learning_rate_alone() -> None:
    sections = make_sections(CONTENT)
    champion = Recipe.model_validate(CONTENT | {"method": {"type": "lora", "r": 8}})
    content = derive_recipe(champion, sections, DATA, "d" * 64, "house-renew-1")
    space = RecipeSpace(Tree("renewal", content))

    assert list(space.holes) == ["train/lr"]
    lr = space.holes["train/lr"]
    assert isinstance(lr, Float)
    assert (lr.log, round(lr.low, 9), round(lr.high, 9)) == (True, 0.0003, 0.003)
    (point,) = space.points()
    assert point["train/lr"] == pytest.approx(0.003 / 10**0.5)
    recipe = space.fix({"train/lr": 0.003})
    assert recipe.name == "house-renew-1"
    assert recipe.method == champion.method
    assert (recipe.train.steps, recipe.train.init_from) == (40, "d" * 64)
    assert (recipe.data.train, recipe.data.eval) == ("/r/train.jsonl", "/r/search.jsonl")
    assert (recipe.data.system, recipe.data.limit) == (None, None)
    assert (recipe.search.trials, recipe.search.sampler) == (5, "auto")


def test_rungs_in_tokens_start_where_those_rows_and_steps_have_their_quarter() -> None:
    scheduler = {"type": "asha", "grace_tokens": 100_000}
    content = CONTENT | {"search": {"trials": 30, "scheduler": scheduler, "max_tokens": 10**6}}
    champion = Recipe.model_validate(CONTENT | {"method": {"type": "lora", "r": 8}})
    derived = derive_recipe(champion, make_sections(content), DATA, "d" * 64, "house-renew-1")
    assert derived["search"]["scheduler"]["grace_tokens"] == "auto"
    assert derived["search"]["max_tokens"] == 10**6
