"""`data.sources` in a recipe: what it means, and what is wrong with it in words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import ValidationError

from graft.core.errors import ConfigError
from graft.objectives.pretrain import PretrainObjective
from graft.objectives.sft import SftObjective
from graft.recipe import RecipeSpace, load_recipe
from graft.recipe.mixture import DataMixture, require_single, sources_of
from graft.recipe.sections import Recipe

MIXED = """\
model: {source: tiny}
data:
  sources:
    - {name: commands, train: a.jsonl, eval: b.jsonl, weight: 0.7}
    - {name: wiki, train: sub/c.jsonl, format: text, weight: 0.3, objective: {type: pretrain}}
"""


@pytest.fixture
def load_mixed(tmp_path: Path) -> Callable[..., RecipeSpace]:
    def load(text: str, *overrides: str) -> RecipeSpace:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return load_recipe(path, overrides)

    return load


def test_each_source_has_its_objective_and_its_weight(
    load_mixed: Callable[..., RecipeSpace], tmp_path: Path
) -> None:
    recipe = load_mixed(MIXED).recipe()
    commands, wiki = recipe.parts
    assert (commands.name, commands.weight, commands.objective) == ("commands", 0.7, SftObjective())
    assert (wiki.name, wiki.weight, wiki.objective) == ("wiki", 0.3, PretrainObjective())
    assert commands.section.train == str(tmp_path / "a.jsonl")
    assert wiki.section.train == str(tmp_path / "sub/c.jsonl")
    assert recipe.data.eval == f"commands: {tmp_path / 'b.jsonl'}"
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


def test_one_source_is_a_part_without_a_name(load_mixed: Callable[..., RecipeSpace]) -> None:
    recipe = load_mixed("model: {source: tiny}\ndata: {train: a.jsonl}\n").recipe()
    (part,) = recipe.parts
    assert (part.name, part.section, part.objective) == ("", recipe.data, recipe.objective)
    assert sources_of(recipe.data) == (recipe.data,)


def test_the_recipes_objective_may_be_searched_where_a_source_names_none(
    load_mixed: Callable[..., RecipeSpace],
) -> None:
    space = load_mixed(MIXED + "objective: {type: {choice: [sft, pretrain]}}\n")
    chosen = [
        space.fix({"objective/type": kind}).parts[0].objective for kind in ("sft", "pretrain")
    ]
    assert chosen == [SftObjective(), PretrainObjective()]


def test_a_sources_own_metric_may_be_searched_for(load_mixed: Callable[..., RecipeSpace]) -> None:
    search = "search: {objectives: [{metric: eval/commands/loss, mode: min}]}\n"
    recipe = load_mixed(MIXED + search).recipe()
    assert recipe.search.objectives[0].metric == "eval/commands/loss"


SOURCE = "{name: a, train: a.jsonl}"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data: {sources: []}", "data.sources: no source is named; name at least one"),
        ("data: {}", ":2: data.train: is required and absent"),
        (f"data: {{train: a.jsonl, sources: [{SOURCE}]}}",
         ":2: data: 'train' beside `sources`: a mixture has nothing else; write it inside each"),
        (f"data: {{sources: [{SOURCE}], max_length: 64}}", "'max_length' beside `sources`"),
        (f"data: {{sources: [{SOURCE}, {SOURCE}]}}", "two sources are called 'a'"),
        ("data: {sources: [{train: a.jsonl}]}", "data.sources.0.name: is required and absent"),
        ("data: {sources: [{name: A/b, train: a.jsonl}]}", "data.sources.0.name: must be text of"),
        ("data: {sources: [{name: a, train: a.jsonl, weight: 0}]}", "weight: must be above 0"),
        ("data: {sources: [{name: a, train: a.jsonl, wieght: 1}]}",
         "data.sources.0.wieght: unknown key. Did you mean 'weight'?"),
        ("data: {sources: [{name: a, train: a.jsonl, objective: {type: stf}}]}",
         "unknown objective type 'stf'. Did you mean 'sft'?"),
        ("data: {sources: [{name: a, train: a.jsonl, objective: {choice: [sft, pretrain]}}]}",
         "a hole may stand in method, objective, train, scale only"),
        (f"data: {{sources: [{SOURCE}, {{name: b, train: b.jsonl, weight: 5000}}]}}",
         "source 'a' has weight 1 of 5001, below one row of a thousand"),
        (f"data: {{sources: [{SOURCE}]}}\n"
         "search: {objectives: [{metric: eval/a/loss, mode: min}]}",
         "unknown metric 'eval/a/loss'. Did you mean 'eval/loss'?"),
    ],
)  # fmt: skip
def test_a_wrong_mixture_gets_one_sentence(
    load_mixed: Callable[..., RecipeSpace], text: str, words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_mixed(f"model: {{source: tiny}}\n{text}\n")
    assert words in str(caught.value)


class SampledObjective(SftObjective):
    """Learns from rollouts; what a recipe of one source may ask for."""

    needs: ClassVar[frozenset[str]] = frozenset({"rollouts"})


class JointObjective(SftObjective):
    """Learns from several rows of a step together."""

    smallest_batch: ClassVar[int] = 4


def mixed(first: SftObjective, second: SftObjective, batch_size: int = 8) -> Recipe:
    sources = [
        {"name": name, "train": f"{name}.jsonl", "objective": objective}
        for name, objective in (("a", first), ("b", second))
    ]
    return Recipe.model_validate(
        {
            "model": {"source": "tiny"},
            "data": {"sources": sources},
            "train": {"batch_size": batch_size},
        }
    )


def test_an_objective_that_samples_is_refused_in_a_mixture() -> None:
    words = "source 'b': objective sft needs rollouts, which rows of a mixture do not have"
    with pytest.raises(ValidationError, match=words):
        mixed(SftObjective(), SampledObjective())


def test_an_objective_of_several_rows_must_be_that_of_all_sources() -> None:
    assert mixed(JointObjective(), JointObjective()).parts[0].objective == JointObjective()
    with pytest.raises(
        ValidationError, match="'a': objective sft learns from 4 rows of a step tog"
    ):
        mixed(JointObjective(), SftObjective())
    with pytest.raises(ValidationError, match="batch_size 3 is too small for objective sft"):
        mixed(JointObjective(), JointObjective(), batch_size=3)


def test_what_needs_one_source_refuses_a_mixture_by_its_names(
    load_mixed: Callable[..., RecipeSpace],
) -> None:
    data = load_mixed(MIXED).recipe().data
    assert isinstance(data, DataMixture)
    with pytest.raises(
        ConfigError, match=r"a renewal needs one .* names commands, wiki; give data\.tr"
    ):
        require_single(data, "a renewal")
