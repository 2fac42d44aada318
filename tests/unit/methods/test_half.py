"""Half fine-tuning: what a round changes, what stays bit for bit, and that rounds pick anew."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from graft.core.spaces import Choice
from graft.engine.multi import MultiAdapterModel
from graft.engine.train import SlotState, Trainer
from graft.methods.half import HalfMethod
from graft.recipe.sections import Recipe
from graft.testing import tiny_model
from tests.unit.engine.conftest import make_recipe
from tests.unit.methods._peft import ROWS

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEEDFORWARD = ("gate_proj", "up_proj", "down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")
LAYERS = 4


def recipe(steps: int, round_steps: int) -> Recipe:
    return make_recipe(
        method=HalfMethod(round_steps=round_steps),
        train={"steps": steps, "batch_size": 4, "lr": 1e-3, "seed": 1, "weight_decay": 0.1},
    )


def started(steps: int, round_steps: int, state: SlotState | None = None) -> Trainer:
    trainer = Trainer(MultiAdapterModel(tiny_model(num_layers=LAYERS)))
    trainer.join("half", recipe(steps, round_steps), ROWS, state=state)
    return trainer


def changed(before: SlotState, after: SlotState) -> set[str]:
    return {
        f"{site}.{key}"
        for site, of_site in after.tensors.items()
        for key, value in of_site.items()
        if not torch.equal(before.tensors[site][key], value)
    }


def count(names: set[str], layer: int, kinds: tuple[str, ...]) -> int:
    return sum(
        name.startswith(f"model.layers.{layer}.") and name.split(".")[-2] in kinds for name in names
    )


def test_a_round_changes_half_of_every_layer_and_the_next_one_picks_anew() -> None:
    trainer = started(steps=12, round_steps=3)
    rounds = []
    for _ in range(4):
        before = trainer.state("half")
        for _ in range(3):
            trainer.step()
        rounds.append(changed(before, trainer.state("half")))
    for names in rounds:
        assert {"model.embed_tokens.weight", "model.norm.weight"} <= names
        assert [count(names, layer, ATTENTION) for layer in range(LAYERS)] == [2] * LAYERS
        assert [count(names, layer, NORMS) for layer in range(LAYERS)] == [1] * LAYERS
        feedforward = [count(names, layer, FEEDFORWARD) for layer in range(LAYERS)]
        assert feedforward in ([1, 2, 1, 2], [2, 1, 2, 1])
    assert len({frozenset(names) for names in rounds}) == len(rounds)


def test_frozen_weights_keep_their_moments_too() -> None:
    trainer = started(steps=4, round_steps=2)
    trainer.step()
    trainer.step()
    first = trainer.state("half")
    trainer.step()
    second = trainer.state("half")
    moved = changed(first, second)
    kept = [key for key in first.optimizer if key not in moved]
    assert kept
    for key in kept:
        for name, value in first.optimizer[key].items():
            assert torch.equal(second.optimizer[key][name], value)


def test_a_run_that_goes_on_ends_as_if_never_interrupted() -> None:
    whole, first = started(8, 3), started(8, 3)
    for _ in range(4):
        first.step()
    second = started(8, 3, state=first.state("half"))
    for trainer in (whole, second):
        while trainer.step():
            pass
    assert not changed(whole.state("half"), second.state("half"))


def test_the_choice_depends_on_seed_and_round_alone() -> None:
    method = HalfMethod(round_steps=10)
    names = [name for name, _ in tiny_model(num_layers=LAYERS).named_parameters()]
    assert method.trained_at(names, 0, seed=1) == method.trained_at(names, 9, seed=1)
    assert method.trained_at(names, 0, seed=1) != method.trained_at(names, 10, seed=1)
    assert method.trained_at(names, 0, seed=1) != method.trained_at(names, 0, seed=2)


def test_a_search_tries_rounds_that_end_within_it() -> None:
    spaces = HalfMethod.search_space()
    assert set(spaces) == {"method.round_steps", "train.lr"}
    assert spaces["method.round_steps"] == Choice(values=(5, 10, 25))


def test_fused_projections_and_experts_are_halved_too() -> None:
    inside = [
        "attn.c_attn.weight",
        "attn.c_attn.bias",
        "attn.c_proj.weight",
        "attn.c_proj.bias",
        "mlp.experts.gate_up_proj",
        "mlp.experts.down_proj",
        "ln_1.weight",
        "ln_2.weight",
    ]
    chosen = HalfMethod().trained_at([f"transformer.h.0.{name}" for name in inside], 0, seed=3)
    assert len(chosen) == 4
    assert sum("c_attn" in name for name in chosen) in (0, 2)
    assert sum("experts" in name for name in chosen) == 1


@pytest.mark.parametrize(
    "scale", [{"workers": 2}, {"workers": 2, "zero_stage": 3}, {"backend": "deepspeed"}]
)
def test_deepspeed_is_refused_with_what_works(scale: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=r"workers: 1, backend: torch.*or use method full"):
        make_recipe(method={"type": "half"}, scale=scale, train={"batch_size": 4})
