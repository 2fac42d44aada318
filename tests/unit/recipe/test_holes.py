from __future__ import annotations

import math
import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest

from graft.core.errors import ConfigError
from graft.core.spaces import Choice, Float, Int, Space
from graft.engine.backends.ops import OPS, ops_of
from graft.methods.lora import LoraMethod
from graft.recipe import RecipeSpace
from graft.recipe.sections import ScaleSection

Load = Callable[..., RecipeSpace]


BRANCHES = """\
method:
  choice:
    - {type: lora, r: {choice: [8, 16]}, lora_dropout: {uniform: [0, 0.5]}}
    - {type: lora, lora_alpha: 64}
train: {lr: {log: [1.0e-5, 1.0e-1]}, steps: {int: [10, 20]}}
"""


def drawn(space: RecipeSpace, seed: int) -> dict[str, Any]:
    """Parameters drawn at random, in the order in which they are asked for."""
    generator = random.Random(seed)
    params: dict[str, Any] = {}

    def suggest(name: str, space: Space) -> Any:
        if isinstance(space, Choice):
            params[name] = generator.choice(space.values)
        elif isinstance(space, Int):
            params[name] = generator.randint(space.low, space.high)
        else:
            params[name] = generator.uniform(space.low, space.high)
        return params[name]

    space.sample(suggest)
    return params


def test_holes_become_spaces_whose_names_carry_their_branch(load: Load) -> None:
    assert load(BRANCHES).holes == {
        "method": Choice(values=("lora#1", "lora#2")),
        "method[lora#1]/r": Choice(values=(8, 16)),
        "method[lora#1]/lora_dropout": Float(low=0, high=0.5),
        "train/lr": Float(low=1e-5, high=1e-1, log=True),
        "train/steps": Int(low=10, high=20),
    }


def test_options_that_only_stand_beside_others_are_among_the_scales(load: Load) -> None:
    space = load(
        "train: {batch_size: 4}\n"
        "scale:\n"
        "  zero_stage: {choice: [0, 1, 3]}\n"
        "  offload: {optimizer: {choice: [none, cpu, nvme]}, nvme_path: /fast}\n"
        "  workers: {int: [1, 3]}\n"
    )
    examples = {recipe.scale.offload.optimizer for recipe in space.examples()}
    assert examples == {"none"}  # the others are refused beside stage 0
    scales = list(space.scales())
    assert {op for scale in scales for op in ops_of(scale)} == set(OPS)
    assert max(scale.max_workers for scale in scales) == 3
    assert {s.zero_stage for s in scales if s.offload.optimizer == "nvme"} == {3}
    assert [scale.workers for scale in load("scale: {workers: 2}\n").scales()] == [2]
    assert next(load("").scales()) == ScaleSection()


def test_only_the_holes_of_the_chosen_branch_are_asked_for(load: Load) -> None:
    space = load(BRANCHES)
    seen = [set(drawn(space, seed)) for seed in range(20)]
    common = {"method", "train/lr", "train/steps"}
    lora = {"method[lora#1]/r", "method[lora#1]/lora_dropout"}
    assert {frozenset(names) for names in seen} == {frozenset(common), frozenset(common | lora)}


def test_a_different_section_in_each_branch_is_a_label(load: Load) -> None:
    space = load("scale: {choice: [{workers: 1}, {workers: 2, zero_stage: 2}]}\n")
    assert space.holes == {
        "scale": Choice(values=('{"workers": 1}', '{"workers": 2, "zero_stage": 2}'))
    }
    second = space.holes["scale"].values[1]  # type: ignore[union-attr]
    assert space.fix({"scale": second}).scale.zero_stage == 2


def test_bare_names_and_lists_are_options_too(load: Load) -> None:
    text = (
        "method: {type: lora, target_modules: {choice: [all-linear, [q_proj, v_proj]]}}\n"
        "objective: sft\ntrain: {betas: {choice: [[0.9, 0.95], [0.9, 0.999]]}}\n"
    )
    space = load(text)
    assert space.holes["method/target_modules"] == Choice(
        values=("all-linear", '["q_proj", "v_proj"]')
    )
    recipe = space.fix(
        {"method/target_modules": '["q_proj", "v_proj"]', "train/betas": "[0.9, 0.95]"}
    )
    assert isinstance(recipe.method, LoraMethod)
    assert recipe.method.target_modules == ("q_proj", "v_proj")
    assert recipe.train.betas == (0.9, 0.95)


def test_default_takes_first_choices_and_middles(load: Load) -> None:
    recipe = load(BRANCHES).default()
    assert isinstance(recipe.method, LoraMethod)
    assert recipe.method.r == 8
    assert recipe.method.lora_dropout == 0.25
    assert math.isclose(recipe.train.lr, 1e-3)
    assert recipe.train.steps == 15


@pytest.mark.parametrize("seed", range(10))
def test_recorded_parameters_rebuild_the_recipe_and_can_be_read_back(load: Load, seed: int) -> None:
    space = load(BRANCHES)
    params = drawn(space, seed)
    recipe = space.fix(params)
    assert space.params_of(recipe) == params
    assert pickle.loads(pickle.dumps(space)).fix(params) == recipe


def test_params_of_leaves_out_what_lies_outside(load: Load) -> None:
    space = load(BRANCHES)
    recipe = load("method: {type: lora, r: 9}\ntrain: {lr: 0.01, steps: 500}\n").recipe()
    assert space.params_of(recipe) == {"train/lr": 0.01}


def test_wrong_parameters_are_named(load: Load) -> None:
    space = load(BRANCHES)
    good = {"method": "lora#2", "train/lr": 1e-3, "train/steps": 10}
    assert space.fix(good).train.steps == 10
    with pytest.raises(ConfigError, match=r"train/step is not a parameter.*'train/steps'"):
        space.fix({**good, "train/step": 3})
    with pytest.raises(
        ConfigError, match=r"no value for train/lr, which may be log \[1e-05, 0\.1\]"
    ):
        space.fix({"method": "lora#2", "train/steps": 10})
    with pytest.raises(ConfigError, match=r"train/steps: 21 is not in int \[10, 20\]"):
        space.fix({**good, "train/steps": 21})


def test_a_recipe_with_holes_names_them_where_one_is_wanted_whole(load: Load) -> None:
    space = load(BRANCHES)
    assert not space.is_complete
    with pytest.raises(ConfigError, match=r"leaves 5 settings open: method, .*graft tune"):
        space.recipe()
    whole = load("train: {steps: 3}\n")
    assert whole.is_complete
    assert whole.recipe() == whole.default() == whole.sample(lambda name, space: None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {lr: {log: [1.0e-2, 1.0e-5]}}", ":3: train.lr: low 0.01 must be below high 1e-05"),
        ("train: {lr: {log: [0, 1]}}", "a log range must start above 0, not at 0.0"),
        ("train: {lr: {uniform: [1, 1]}}", "from 1.0 to 1.0 is none; write 1.0 itself"),
        ("train: {lr: {uniform: [0, 1]}}", "train.lr: must be above 0"),
        ("train: {lr: {log: [1]}}", "`log` takes two numbers, [low, high]"),
        ("train: {lr: {log: 3}}", "`log` takes two numbers, [low, high]"),
        ("train: {lr: {log: [a, b]}}", "`log` takes two numbers, [low, high]"),
        ("train: {steps: {int: [1.5, 3]}}", "`int` takes two whole numbers"),
        ("train: {steps: {int: [0, 3]}}", "train.steps: must be at least 1, not 0"),
        ("train: {steps: {log: [1, 8]}}", "train.steps: must be a whole number, not 1.0"),
        ("train: {lr: {log: [1, 8], int: [1, 8]}}", "a hole has one key of"),
        ("train: {lr: {choice: []}}", "a choice is a list of two or more values"),
        ("train: {lr: {choice: [0.1]}}", "a choice of one value is none; write 0.1 itself"),
        ("train: {lr: {choice: [0.1, 0.2, 0.1]}}", "the choice holds 0.1 twice"),
        ("train: {lr: {choice: [1, 1.0]}}", "the choice holds 1.0 twice"),
        ("train: {lr: {choice: [{log: [1, 2]}, 1]}}", "may not be a hole itself"),
        ("method: {type: lora, r: {choice: [8,\n  0]}}", ":4: method.r.1: must be at least 1"),
        ("method: {choice: [{type: lora}, {type: lora, rr: 1}]}", "method.1.rr: unknown key."),
        ("method: {choice: [lora, loar]}", "method.1: unknown method type 'loar'."),
        ("search: {trials: {choice: [1, 2]}}", ":3: search.trials: a hole may stand in method, "),
        ("serve: {tenants: [{name: {choice: [a, b]}, key_env: A}]}", "a hole may stand in "),
        ("model: {source: {choice: [a, b]}}", "twice"),
        ("train: {lr: {log: [1.0e-5, 1]}}\nsearch: {points: [{train.stepz: 3}]}",
         "search.points.0.train.stepz: is not an open setting."),
        ("train: {lr: {log: [1.0e-5, 1]}}\nsearch: {points: [{train.lr: 3}]}",
         "search.points.0.train.lr: 3 is not in log [1e-05, 1]"),
    ],
)  # fmt: skip
def test_a_hole_that_makes_no_sense_is_refused_at_load(load: Load, text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(text + "\n")
    assert words in str(caught.value)
    assert "problems" not in str(caught.value)


def test_a_search_on_held_out_metrics_needs_held_out_rows(load: Load) -> None:
    head = "model: {source: x/y}\ndata: {train: a.jsonl}\n"
    assert load("train: {lr: 1.0e-4}\n", head=head).is_complete
    with pytest.raises(ConfigError, match=r"eval/loss, measured on held-out rows; add data\.eval"):
        load("train: {lr: {log: [1.0e-4, 1.0e-3]}}\n", head=head)


def test_a_combination_that_is_refused_is_left_to_the_search(load: Load) -> None:
    space = load("scale: {zero_stage: {choice: [0, 2]}, backend: {choice: [torch, deepspeed]}}\n")
    for stage, backend in ((0, "torch"), (0, "deepspeed"), (2, "deepspeed")):
        assert space.fix({"scale/zero_stage": stage, "scale/backend": backend})
    with pytest.raises(ConfigError, match=r"the combination .* is refused: scale: zero_stage 2"):
        space.fix({"scale/zero_stage": 2, "scale/backend": "torch"})


def test_stage_offload_and_checkpointing_may_be_searched(load: Load) -> None:
    space = load(
        "scale:\n"
        "  workers: 2\n"
        "  zero_stage: {choice: [0, 1, 2, 3]}\n"
        "  offload: {optimizer: {choice: [none, cpu]}, parameters: {choice: [none, cpu]}}\n"
        "  gradient_checkpointing: {choice: [false, true]}\n"
    )
    names = ("zero_stage", "offload/optimizer", "offload/parameters", "gradient_checkpointing")
    assert set(space.holes) == {f"scale/{name}" for name in names}
    values = dict(zip((f"scale/{name}" for name in names), (3, "cpu", "cpu", True), strict=True))
    scale = space.fix(values).scale
    assert (scale.zero_stage, scale.offload.parameters, scale.gradient_checkpointing) == (
        3,
        "cpu",
        True,
    )
    with pytest.raises(ConfigError, match=r"offload\.parameters needs `zero_stage: 3`"):
        space.fix({**values, "scale/zero_stage": 2})


def test_a_space_whose_every_combination_is_refused_says_why(load: Load) -> None:
    with pytest.raises(ConfigError, match=r"is below scale\.workers"):
        load("scale: {workers: {choice: [16, 32]}}\n")


def test_points_may_be_written_with_dots_and_may_be_partial(load: Load) -> None:
    space = load(
        "train: {lr: {log: [1.0e-5, 1]}}\nmethod: {type: lora, r: {choice: [4, 8]}}\n"
        "search: {points: [{train.lr: 0.01}, {method/r: 8, train/lr: 0.1}]}\n"
    )
    assert space.points() == [{"train/lr": 0.01}, {"method/r": 8, "train/lr": 0.1}]


def test_space_auto_opens_what_the_method_names_and_the_recipe_does_not(load: Load) -> None:
    text = "search: {space: auto}\n"
    vetted = LoraMethod.search_space()
    assert load(text).holes == {name.replace(".", "/"): space for name, space in vetted.items()}
    assert set(load(text + "train: {lr: 0.001}\n").holes) == {"method/r"}
    assert load(text + "method: {type: lora, r: 4}\ntrain: {lr: 0.001}\n").is_complete


def test_space_auto_opens_the_objective_too(load: Load) -> None:
    text = "search: {space: auto}\nmethod: {type: lora, r: 4}\ntrain: {lr: 0.001}\n"
    assert set(load(text + "objective: dpo\n").holes) == {"objective/beta"}
    assert load(text + "objective: {type: dpo, beta: 0.2}\n").is_complete
    space = load(text + "objective: {choice: [{type: dpo}, {type: orpo, beta: 0.3}]}\n")
    assert set(space.holes) == {"objective", "objective[dpo]/beta"}
    recipe = space.fix({"objective": "dpo", "objective[dpo]/beta": 0.5})
    assert recipe.objective.model_dump()["beta"] == 0.5


def test_space_auto_opens_nothing_twice(load: Load) -> None:
    """Each method of a choice has its own learning rate; the objective's would never be trained."""
    objectives = ("reward", "{choice: [{type: reward}, {type: dpo}]}")
    for text in (f"objective: {objective}\n" for objective in objectives):
        space = load("search: {space: auto}\nmethod: {choice: [lora, ia3]}\n" + text)
        rates = {name for name in space.holes if name.endswith("train/lr") or "train.lr" in name}
        assert rates == {"method[lora]/train.lr", "method[ia3]/train.lr"}


@pytest.mark.parametrize("choice", ["[lora, 3]", "[lora, null]", "[lora, true]"])
def test_space_auto_of_what_is_no_method_is_refused_in_words(load: Load, choice: str) -> None:
    with pytest.raises(ConfigError):
        load(f"search: {{space: auto}}\nmethod: {{choice: {choice}}}\n")


def test_space_auto_keeps_each_branch_of_a_choice_apart(load: Load) -> None:
    space = load(
        "search: {space: auto}\n"
        "method: {choice: [{type: lora, lora_alpha: 8}, {type: lora, lora_alpha: 16}]}\n"
    )
    assert set(space.holes) == {"method", "method[lora#1]/r", "method[lora#1]/train.lr",
                                "method[lora#2]/r", "method[lora#2]/train.lr"}  # fmt: skip
    recipe = space.fix({"method": "lora#2", "method[lora#2]/r": 8, "method[lora#2]/train.lr": 1e-3})
    assert recipe.train.lr == 1e-3
    assert space.params_of(recipe)["method[lora#2]/train.lr"] == 1e-3


def test_combinations_are_counted_over_branches(load: Load) -> None:
    assert load("train: {steps: 3}\n").num_combinations == 1
    assert load("train: {lr: {log: [1.0e-5, 1]}}\n").num_combinations is None
    text = (
        "method: {choice: [{type: lora, r: {choice: [1, 2, 3]}}, {type: lora}]}\n"
        "train: {steps: {int: [1, 5]}}\n"
    )
    assert load(text).num_combinations == 4 * 5
