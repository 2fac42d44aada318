"""AdaLoRA against PEFT's own loop: the budget, the penalty, the ranks that are cut, the files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from pydantic import ValidationError

from graft.compressors.base import Adapter
from graft.compressors.folder import load_adapter, save_adapter
from graft.core.errors import AdapterError, ConfigError
from graft.engine.checkpoint import load_checkpoint, save_checkpoint
from graft.engine.multi import AdapterTensors, MultiAdapterModel
from graft.engine.train import Trainer
from graft.methods.adalora import AdaloraMethod
from graft.methods.base import Surroundings
from graft.recipe.sections import Recipe
from graft.testing import tiny_model
from tests.unit.engine.conftest import exact_model, make_recipe
from tests.unit.methods._peft import (
    ROWS,
    largest_difference,
    load_state,
    round_trip,
    same_logits_as_peft,
    same_logits_here,
    stirred,
    train_with_peft,
)

STEPS, TINIT, TFINAL = 24, 3, 5
METHOD = AdaloraMethod(init_r=6, target_r=3, tinit=TINIT, tfinal=TFINAL, lora_alpha=8.0)
NUM_SITES = 14

peft_errs = pytest.mark.filterwarnings(
    "ignore:Adapter 'default'.*have invalid shape",
    "ignore:The following rank_pattern keys did not match",
)
"""PEFT takes a layer that lost all of its ranks for one that was not gathered, and warns of its own
AdaLoRA files, whose `rank_pattern` it reads as LoRA's before it reads it as it should."""


def recipe(method: AdaloraMethod = METHOD, **train: Any) -> Recipe:
    settings = {"steps": STEPS, "batch_size": 4, "lr": 2e-3, "seed": 1, **train}
    return make_recipe(method=method, train=settings)


def joined(method: AdaloraMethod = METHOD, **join: Any) -> Trainer:
    trainer = Trainer(MultiAdapterModel(exact_model()))
    trainer.join("own", recipe(method), ROWS, **join)
    return trainer


def num_ranks(tensors: AdapterTensors) -> int:
    return sum(int((of_site["lora_E"] != 0).sum()) for of_site in tensors.values())


def flat(tensors: AdapterTensors) -> dict[str, torch.Tensor]:
    return {f"{site}.{key}": value for site, of in tensors.items() for key, value in of.items()}


def papers_budget(step: int) -> int:
    """Equation 7 of the paper, with a mean rank of 6 at the start and 3 at the end."""
    if step < TINIT:
        return 6 * NUM_SITES
    if step >= STEPS - TFINAL:
        return 3 * NUM_SITES
    left = 1 - (step - TINIT) / (STEPS - TFINAL - TINIT)
    return math.floor(3 * NUM_SITES + (6 - 3) * NUM_SITES * left**3)


def test_the_ranks_that_are_left_follow_the_papers_schedule() -> None:
    trainer = joined()
    left = []
    while reports := trainer.step():
        left.append(num_ranks(trainer.state("own").tensors))
        assert reports["own"].is_finite
    assert left == [papers_budget(step) for step in range(1, STEPS + 1)]
    assert left[0] == 6 * NUM_SITES
    assert left[-1] == 3 * NUM_SITES


def their_penalty(model: PeftModel) -> torch.Tensor:
    """What PEFT's AdaLoRA adds to any loss."""
    ids = torch.tensor([[5, 6, 7]])
    adapted = model.base_model
    return adapted(input_ids=ids, labels=ids).loss - adapted.model(input_ids=ids, labels=ids).loss


@peft_errs
@pytest.mark.parametrize("delta_t", [1, 4])
def test_its_training_is_that_of_peft(delta_t: int) -> None:
    method = METHOD.model_copy(update={"deltaT": delta_t})
    trainer = joined(method)
    start = trainer.state("own").tensors
    while trainer.step():
        pass
    config, ours = method.to_peft(trainer.state("own").tensors, "tiny")
    settings = {key: config[key] for key in ("init_r", "target_r", "lora_alpha", "target_modules")}
    wanted = AdaLoraConfig(**settings, tinit=TINIT, tfinal=TFINAL, deltaT=delta_t, total_step=STEPS)
    twin = get_peft_model(exact_model(), wanted, autocast_adapter_dtype=False).double()
    load_state(twin, method.to_peft(start, "tiny")[1])
    train_with_peft(
        twin,
        recipe(method),
        extra_loss=their_penalty,
        after_step=lambda model, step: model.base_model.update_and_allocate(step + 1),
    )
    theirs = get_peft_model_state_dict(twin)
    assert twin.peft_config["default"].rank_pattern == config["rank_pattern"]
    assert sum(map(sum, config["rank_pattern"].values())) == 3 * NUM_SITES
    assert ours.keys() == theirs.keys()
    assert largest_difference(ours, theirs) <= 1e-5


@pytest.mark.parametrize("stop", [9, 21], ids=["while ranks fall", "after the last cut"])
def test_it_continues_in_mid_schedule_as_if_never_interrupted(stop: int, tmp_path: Path) -> None:
    whole = joined()
    for _ in range(stop):
        whole.step()
    state, _ = load_checkpoint(save_checkpoint(tmp_path, whole.state("own"), {}))
    kinds = {key.rpartition(".")[2] for key in state.memory}
    assert kinds == ({"sensitivity", "uncertainty"} if stop == 9 else {"kept"})
    second = joined(state=state)
    for trainer in (whole, second):
        while trainer.step():
            pass
    ends = [flat(trainer.state("own").tensors) for trainer in (whole, second)]
    assert largest_difference(*ends) <= 1e-12


def test_beside_adapters_of_other_methods_it_trains_as_alone() -> None:
    train = {"steps": 8, "batch_size": 3}
    methods = {
        "a": {"type": "adalora", "init_r": 6, "target_r": 3},
        "b": {"type": "adalora", "init_r": 4, "target_r": 2, "tfinal": 2, "lora_dropout": 0.1},
        "c": {"type": "ia3"},
        "d": {"type": "bottleneck", "placement": "houlsby"},
    }
    recipes = {
        name: make_recipe(method=method, train={**train, "seed": number})
        for number, (name, method) in enumerate(methods.items())
    }

    def trained(*names: str) -> Trainer:
        trainer = Trainer(MultiAdapterModel(exact_model()))
        for name in names:
            trainer.join(name, recipes[name], ROWS)
        while trainer.step():
            pass
        return trainer

    together = trained(*recipes)
    for name in recipes:
        alone = trained(name).state(name).tensors
        assert largest_difference(flat(together.state(name).tensors), flat(alone)) <= 1e-10


def test_the_penalty_is_in_the_gradient_and_not_in_the_reported_loss() -> None:
    first = {
        weight: joined(METHOD.model_copy(update={"orth_reg_weight": weight})).step()["own"]
        for weight in (0.0, 10.0)
    }
    assert first[0.0].loss == first[10.0].loss
    assert first[10.0].grad_norm > first[0.0].grad_norm


def with_cut_ranks() -> Adapter:
    adapter = stirred(METHOD)
    for number, of_site in enumerate(adapter.tensors.values()):
        of_site["lora_E"][: number % 7] = 0.0  # the seventh layer has no rank left
    return adapter


@peft_errs
def test_cut_ranks_are_left_out_of_files_that_peft_reads(tmp_path: Path) -> None:
    adapter = with_cut_ranks()
    same_logits_as_peft(adapter, tmp_path)
    round_trip(adapter, tmp_path)
    _, state = adapter.method.to_peft(adapter.tensors, "tiny")
    assert {value.shape[0] for key, value in state.items() if "lora_E" in key} == set(range(7))
    same_logits_as_peft(stirred(METHOD), tmp_path / "whole")


@peft_errs
def test_what_peft_trained_and_cut_is_read(tmp_path: Path) -> None:
    config = AdaLoraConfig(
        init_r=4, target_r=2, total_step=3, target_modules=["q_proj", "up_proj"], lora_alpha=4
    )

    def train(model: PeftModel) -> None:
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        ids = torch.arange(5, 15)[None]
        for step in (1, 2, 3):
            model(input_ids=ids, labels=ids).loss.backward()
            model.base_model.update_and_allocate(step)

    adapter = same_logits_here(config, tmp_path, stir=train)
    assert isinstance(adapter.method, AdaloraMethod)
    assert adapter.method.init_r == 4
    assert num_ranks(adapter.tensors) == 2 * 4


def test_a_fresh_adapter_is_saved_whole(tmp_path: Path) -> None:
    fresh = MultiAdapterModel(tiny_model()).fresh_tensors(METHOD)
    save_adapter(tmp_path / "fresh", Adapter(METHOD, fresh), "tiny")
    loaded = load_adapter(tmp_path / "fresh")
    assert all(torch.equal(flat(loaded.tensors)[key], value) for key, value in flat(fresh).items())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda pattern: [1], "must name the layers"),
        (lambda pattern: dict(list(pattern.items())[1:]), "must name the layers"),
        (lambda pattern: {**pattern, next(iter(pattern)): [True] * 5}, "a list of 6 true or false"),
        (lambda pattern: {**pattern, next(iter(pattern)): [1] * 6}, "a list of 6 true or false"),
        (lambda pattern: {key: [False] * 6 for key in pattern}, r"rank_pattern keeps 0 ranks"),
    ],
)
def test_a_hostile_rank_pattern_is_refused(change: Any, words: str) -> None:
    config, state = METHOD.to_peft(with_cut_ranks().tensors, "tiny")
    config["rank_pattern"] = change(config["rank_pattern"])
    with pytest.raises(AdapterError, match=words):
        AdaloraMethod.from_peft(config, state)


def test_the_divisor_of_older_files_must_be_the_rank_at_the_start() -> None:
    adapter = stirred(METHOD)
    config, state = METHOD.to_peft(adapter.tensors, "tiny")
    key = next(iter(state)).rpartition(".")[0] + ".ranknum"
    _, tensors = AdaloraMethod.from_peft(config, {**state, key: torch.tensor([6.0])})
    assert tensors.keys() == adapter.tensors.keys()
    with pytest.raises(AdapterError, match="ranknum is not init_r 6"):
        AdaloraMethod.from_peft(config, {**state, key: torch.tensor([5.0])})


def test_a_schedule_longer_than_the_run_is_refused_before_anything_loads() -> None:
    method = AdaloraMethod(tinit=200, tfinal=500)
    (reason,) = method.refusals(Surroundings(steps=300))
    assert "train.steps 300 - tfinal 500" in reason
    assert "set train.steps above 700, or tinit + tfinal below 300" in reason
    assert method.refusals(Surroundings(steps=701)) == []
    with pytest.raises(ValidationError, match="leaves no step for it"):
        recipe(method)
    for steps in (1, 2, 20, 5000):
        assert AdaloraMethod().refusals(Surroundings(steps=steps)) == []
    assert AdaloraMethod().cutting_steps(5000) == (200, 4500)
    (reason,) = AdaloraMethod().refusals(Surroundings(steps=50, zero_stage=2))
    assert "scale.zero_stage 2" in reason


def test_bad_settings_are_refused_in_words() -> None:
    linears = MultiAdapterModel(tiny_model()).linears
    with pytest.raises(ConfigError, match=r"method\.init_r: 40 is above the size of .* at most 32"):
        AdaloraMethod(init_r=40).sites(linears)
    with pytest.raises(ConfigError, match=r"'q_prj' matches no linear layer.*q_proj"):
        AdaloraMethod(target_modules=("q_prj",)).sites(linears)
    with pytest.raises(ValidationError, match="target_r 8 is above init_r 4"):
        AdaloraMethod(init_r=4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_it_trains_on_a_quantized_base(quantization: str, quantized: Any) -> None:
    trainer = Trainer(quantized(quantization))
    trainer.join("own", recipe(AdaloraMethod(), steps=4, batch_size=24, lr=2e-2), ROWS)
    losses = [trainer.step()["own"].loss for _ in range(4)]
    assert losses[-1] < losses[0]


def test_layers_to_transform_is_pefts(tmp_path: Path) -> None:
    upper = METHOD.model_copy(update={"layers_to_transform": (1,)})
    same_logits_as_peft(upper, tmp_path)
    round_trip(upper, tmp_path)
    config = AdaLoraConfig(
        init_r=6, target_r=3, total_step=10, target_modules=["q_proj"], layers_to_transform=[1],
        task_type="CAUSAL_LM",
    )  # fmt: skip
    method = same_logits_here(config, tmp_path).method
    assert isinstance(method, AdaloraMethod)
    assert method.layers_to_transform == (1,)
