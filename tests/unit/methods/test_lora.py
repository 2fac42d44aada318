"""LoRA's first weights, LoRA+ and files against PEFT's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora import Linear as PeftLinear
from pydantic import ValidationError

from graft.compressors.base import Adapter
from graft.compressors.folder import load_adapter
from graft.compressors.svd import SvdCompressor
from graft.core.errors import ConfigError, ModelError
from graft.engine.batches import RoutedRow, collate
from graft.engine.calibrate import input_moments
from graft.engine.multi import AdapterTensors, MultiAdapterModel, Routing
from graft.engine.multi.frozen import FrozenLinear
from graft.engine.train import Trainer
from graft.methods.base import Surroundings
from graft.methods.lora import LoraMethod
from graft.testing import tiny_model
from tests.unit.engine.conftest import exact_model, make_recipe
from tests.unit.methods._peft import (
    IDS,
    ROWS,
    assert_close,
    follow_peft,
    our_logits,
    peft_twin,
    round_trip,
    same_logits_as_peft,
    same_logits_here,
    stirred,
    train_with_peft,
)

SMALL = {"r": 4, "lora_alpha": 6.0, "target_modules": ("q_proj", "down_proj")}
TAKEN = ("pissa", "olora")


def lora(**settings: Any) -> LoraMethod:
    return LoraMethod.model_validate({**SMALL, **settings})


def peft_start(kind: str, **settings: Any) -> PeftModel:
    """PEFT's model with its own first weights, in fp32."""
    torch.manual_seed(0)
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=kind,
        task_type="CAUSAL_LM", **settings,
    )  # fmt: skip
    model = get_peft_model(tiny_model(), config)
    assert isinstance(model, PeftModel)
    return model


def peft_layers(model: PeftModel) -> dict[str, PeftLinear]:
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, PeftLinear)
    }


def fresh(method: LoraMethod, seed: int = 0) -> AdapterTensors:
    return MultiAdapterModel(tiny_model()).fresh_tensors(method, seed=seed)


def logits(model: MultiAdapterModel, slot: str | None) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model.hidden(IDS, routing=Routing.single(slot, len(IDS))))


@pytest.mark.parametrize("use_rslora", [False, True])
def test_folders_pass_between_peft_and_us(tmp_path: Path, use_rslora: bool) -> None:
    same_logits_as_peft(lora(use_rslora=use_rslora), tmp_path)
    round_trip(lora(use_rslora=use_rslora), tmp_path)
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], use_rslora=use_rslora,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    read = same_logits_here(config, tmp_path)
    assert isinstance(read.method, LoraMethod)


def test_under_plus_a_reward_models_head_learns_at_the_rate_itself() -> None:
    method = lora(loraplus_lr_ratio=16.0)
    rates = {name: method.lr_scale(name) for name in ("lora_A", "lora_B", "weight")}
    assert rates == {"lora_A": 1.0, "lora_B": 16.0, "weight": 1.0}


def test_training_follows_peft_with_plus() -> None:
    def plus(model: PeftModel, lr: float) -> torch.optim.Optimizer:
        return create_loraplus_optimizer(model, torch.optim.AdamW, lr=lr, loraplus_lr_ratio=8.0)

    follow_peft(lora(loraplus_lr_ratio=8.0), optimizer=plus)


@pytest.mark.parametrize("kind", TAKEN)
def test_what_is_taken_from_the_base_is_what_peft_takes(kind: str) -> None:
    """PEFT changes its base by the first pair; its change is our first update."""
    ours, layers = fresh(lora(init_lora_weights=kind)), peft_layers(peft_start(kind))
    base = tiny_model()
    assert ours.keys() == layers.keys()
    for site, tensors in ours.items():
        taken = base.get_submodule(site).weight - layers[site].base_layer.weight
        torch.testing.assert_close(
            1.5 * tensors["lora_B0"] @ tensors["lora_A0"], taken, atol=1e-5, rtol=1e-5
        )
        assert torch.equal(tensors["lora_A"], tensors["lora_A0"])


@pytest.mark.parametrize("kind", TAKEN)
def test_training_from_a_part_of_the_base_follows_peft(kind: str) -> None:
    theirs = peft_start(kind)
    method = lora(init_lora_weights=kind)
    tensors = {}
    for site, layer in peft_layers(theirs).items():
        a = layer.lora_A["default"].weight.detach().clone()
        b = layer.lora_B["default"].weight.detach().clone()
        tensors[site] = {"lora_A": a, "lora_B": b, "lora_A0": a.clone(), "lora_B0": b.clone()}
    recipe = make_recipe(method=method, train={"steps": 20, "batch_size": 4, "lr": 1e-3, "seed": 1})
    trainer = Trainer(MultiAdapterModel(exact_model()))
    trainer.join("own", recipe, ROWS, tensors=tensors)
    while trainer.step():
        pass
    exact = peft_twin(LoraMethod.model_validate(SMALL), fresh(lora()))
    for (site, layer), mine in zip(
        peft_layers(theirs).items(), peft_layers(exact).values(), strict=True
    ):
        first = 1.5 * tensors[site]["lora_B"].double() @ tensors[site]["lora_A"].double()
        mine.base_layer.weight.data -= first
        mine.lora_A["default"].weight.data = tensors[site]["lora_A"].double()
        mine.lora_B["default"].weight.data = tensors[site]["lora_B"].double()
        assert layer.scaling == mine.scaling
    train_with_peft(exact, recipe)
    ended = trainer.state("own").tensors
    for site, layer in peft_layers(exact).items():
        for name in ("lora_A", "lora_B"):
            weight = getattr(layer, name)["default"].weight
            torch.testing.assert_close(ended[site][name], weight.detach(), atol=1e-5, rtol=0)
            assert not torch.equal(ended[site][name], tensors[site][name].double())
        assert torch.equal(ended[site]["lora_A0"], tensors[site]["lora_A0"].double())


@pytest.mark.parametrize("kind", ["default", "gaussian", "orthogonal", "pissa", "olora"])
def test_first_weights_change_nothing_and_neighbours_may_differ(kind: str) -> None:
    model = MultiAdapterModel(tiny_model())
    base = logits(model, None)
    model.add_slot("own", lora(init_lora_weights=kind), seed=3)
    torch.testing.assert_close(logits(model, "own"), base, atol=1e-5, rtol=1e-5)
    if kind in TAKEN:
        assert torch.equal(logits(model, "own"), base)


def test_gaussian_and_orthogonal_weights_have_pefts_spread() -> None:
    gaussian = fresh(lora(init_lora_weights="gaussian"))
    spread = torch.cat([t["lora_A"].flatten() for t in gaussian.values()]).std()
    assert float(spread) == pytest.approx(1 / 4, rel=0.1)
    theirs = peft_layers(peft_start("orthogonal")).values()
    expected = torch.cat([x.lora_A["default"].weight.detach().flatten() for x in theirs]).std()
    ours = fresh(lora(init_lora_weights="orthogonal"))
    spread = torch.cat([t["lora_A"].flatten() for t in ours.values()]).std()
    assert float(spread) == pytest.approx(float(expected), rel=0.15)
    for tensors in ours.values():
        assert (tensors["lora_B"] @ tensors["lora_A"]).abs().max() < 1e-6
        assert tensors["lora_B"].abs().min() > 0


def test_orthogonal_refuses_an_odd_rank() -> None:
    with pytest.raises(ValidationError, match="even r, not 5"):
        lora(r=5, init_lora_weights="orthogonal")


@pytest.mark.filterwarnings("ignore:lora with eva initialization")
def test_eva_finds_the_subspace_that_peft_finds() -> None:
    from peft.tuners.lora import get_eva_state_dict

    batch = collate([RoutedRow(None, row, i) for i, row in enumerate(ROWS)], torch.device("cpu"))
    assert batch.attention_mask is not None
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    theirs = get_eva_state_dict(
        peft_start("eva", eva_config=EvaConfig(rho=1.0, tau=0.999)),
        [inputs],
        show_progress_bar=False,
    )
    routed = MultiAdapterModel(tiny_model())
    method = lora(init_lora_weights="eva")
    sites = [site.name for site in method.sites(routed.linears)]
    moments = input_moments(routed, sites, ROWS)
    ours = routed.fresh_tensors(method, moments=moments)
    assert {key.removeprefix("base_model.model.") for key in theirs} == set(ours)
    for key, components in theirs.items():
        site = key.removeprefix("base_model.model.")
        a, b = ours[site]["lora_A"], components.float()
        torch.testing.assert_close(a @ a.T, torch.eye(4), atol=1e-5, rtol=0)
        ours_explain, theirs_explain = (float((p @ moments[site] @ p.T).trace()) for p in (a, b))
        # Theirs is a randomized decomposition, a little below the best one.
        assert 0.98 * ours_explain <= theirs_explain <= ours_explain * (1 + 1e-5)
        assert torch.linalg.svdvals(a @ b.T).square().mean() > 0.9


def test_eva_reads_the_training_rows_when_it_joins_and_says_so_where_there_are_none() -> None:
    method = lora(init_lora_weights="eva")
    trainer = Trainer(MultiAdapterModel(tiny_model()))
    trainer.join("own", make_recipe(method=method), ROWS)
    start = trainer.state("own").tensors
    for tensors in start.values():
        torch.testing.assert_close(tensors["lora_A"].norm(dim=1), torch.ones(4))
    assert trainer.step()["own"].is_finite
    with pytest.raises(ModelError, match="training"):
        fresh(method)


def test_layers_with_one_input_share_one_moment() -> None:
    routed = MultiAdapterModel(tiny_model())
    moments = input_moments(routed, list(routed.linears), ROWS)
    layer = "model.layers.0.self_attn"
    assert moments[f"{layer}.q_proj"] is moments[f"{layer}.v_proj"]
    assert moments[f"{layer}.q_proj"] is not moments[f"{layer}.o_proj"]
    seen = []
    handle = routed.base.get_submodule(f"{layer}.o_proj").register_forward_pre_hook(
        lambda _, args: seen.append(args[0].detach())
    )
    for row in ROWS:
        with torch.no_grad():
            routed.hidden(torch.tensor([row.input_ids]), routing=Routing.single(None, 1))
    handle.remove()
    x = torch.cat([part[0] for part in seen]).double()
    expected = torch.cov(x.T, correction=0).float()
    torch.testing.assert_close(moments[f"{layer}.o_proj"], expected, atol=1e-6, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_loftq_starts_from_the_best_correction_of_what_rounding_lost(
    quantized: Callable[[str], MultiAdapterModel], quantization: str
) -> None:
    model = quantized(quantization)
    method = lora(init_lora_weights="loftq")
    tensors = model.fresh_tensors(method)
    whole = tiny_model()
    for site, pair in tensors.items():
        dense = FrozenLinear(model.layers.modules[site], site).weight()
        lost = whole.get_submodule(site).weight.detach() - dense
        left = torch.linalg.svdvals(lost - method.update(pair))
        torch.testing.assert_close(left[:-4], torch.linalg.svdvals(lost)[4:], atol=1e-5, rtol=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_loftq_brings_a_four_bit_base_nearer_to_the_whole_one(
    quantized: Callable[[str], MultiAdapterModel],
) -> None:
    model, whole = quantized("nf4"), logits(MultiAdapterModel(tiny_model()), None)
    before = (logits(model, None) - whole).norm()
    method = LoraMethod(r=32, lora_alpha=64.0, init_lora_weights="loftq")
    model.add_slot("own", method)
    assert (logits(model, "own") - whole).norm() < 0.8 * before


@pytest.mark.parametrize(
    ("kind", "quantization", "message"),
    [
        ("pissa", "nf4", "use loftq"),
        ("olora", "int8", "use loftq"),
        ("loftq", "none", "use pissa"),
        ("pissa", "none", None),
        ("loftq", "nf4", None),
        ("eva", "nf4", None),
    ],
)
def test_first_weights_that_do_not_fit_the_base_are_refused_with_the_nearest_that_do(
    kind: str, quantization: str, message: str | None
) -> None:
    refused = lora(init_lora_weights=kind).refusals(Surroundings(quantization=quantization))
    assert refused == [] if message is None else message in refused[0]


def test_a_rank_above_the_size_of_a_layer_is_refused_and_counts_as_it_is_saved() -> None:
    linears = MultiAdapterModel(tiny_model()).linears
    with pytest.raises(ConfigError, match="use at most 32"):
        lora(r=33, target_modules=("k_proj",)).sites(linears)
    with pytest.raises(ConfigError, match=r"pissa is saved at rank 2 r.*use at most 16"):
        lora(r=17, target_modules=("k_proj",), init_lora_weights="pissa").sites(linears)


@pytest.mark.parametrize("kind", TAKEN)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_an_adapter_taken_from_the_base_is_saved_as_a_plain_one_and_goes_on(
    tmp_path: Path, kind: str, use_rslora: bool
) -> None:
    method = lora(init_lora_weights=kind, use_rslora=use_rslora)
    adapter = stirred(method)
    same_logits_as_peft(adapter, tmp_path)
    read = load_adapter(tmp_path / "ours")
    assert isinstance(read.method, LoraMethod)
    assert (read.method.r, read.method.init_lora_weights) == (8, "default")
    assert torch.equal(our_logits(read), our_logits(adapter))
    again = method.starting_tensors(read.method, read.tensors)
    for site, tensors in adapter.tensors.items():
        assert again[site].keys() == tensors.keys()
        for key, value in tensors.items():
            torch.testing.assert_close(again[site][key], value, atol=1e-6, rtol=1e-6)
    assert_close(our_logits(Adapter(method, again)), our_logits(adapter))


def test_weights_of_another_scale_compute_the_same_where_training_starts_from_them() -> None:
    given = lora(lora_alpha=32)
    adapter = stirred(given)
    own = lora(lora_alpha=4, use_rslora=True)
    tensors = own.starting_tensors(given, adapter.tensors)
    assert_close(our_logits(Adapter(own, tensors)), our_logits(adapter))
    assert given.starting_tensors(given, adapter.tensors) is adapter.tensors


def test_svd_reads_an_adapter_taken_from_the_base() -> None:
    adapter = stirred(lora(init_lora_weights="pissa"))
    assert isinstance(adapter.method, LoraMethod)
    whole = SvdCompressor(r=8).compress(adapter)
    small = SvdCompressor(r=3).compress(adapter)
    assert isinstance(small.method, LoraMethod)
    for site, tensors in adapter.tensors.items():
        update = adapter.method.update(tensors)
        assert isinstance(whole.method, LoraMethod)
        torch.testing.assert_close(
            whole.method.update(whole.tensors[site]), update, atol=1e-5, rtol=1e-4
        )
        values = torch.linalg.svdvals(update)
        left = torch.linalg.svdvals(update - small.method.update(small.tensors[site]))
        torch.testing.assert_close(left[:5], values[3:8], atol=1e-5, rtol=1e-3)


def test_slots_of_every_kind_train_together_as_alone() -> None:
    recipes = {
        name: make_recipe(
            method={"r": r, "type": "lora", "lora_dropout": p, "init_lora_weights": kind, **more},
            train={"steps": 6, "batch_size": 4, "lr": 2e-3, "seed": seed},
        )
        for seed, (name, kind, r, p, more) in enumerate(
            [
                ("plain", "default", 6, 0.2, {}),
                ("pissa", "pissa", 4, 0.1, {"loraplus_lr_ratio": 4.0}),
                ("olora", "olora", 8, 0.0, {"use_rslora": True}),
                ("eva", "eva", 3, 0.0, {}),
            ]
        )
    }

    def run(names: list[str]) -> dict[str, AdapterTensors]:
        trainer = Trainer(MultiAdapterModel(exact_model()))
        for name in names:
            trainer.join(name, recipes[name], ROWS)
        while trainer.step():
            pass
        return {name: trainer.state(name).tensors for name in names}

    packed = run(list(recipes))
    for name in recipes:
        alone = run([name])[name]
        for site, tensors in alone.items():
            for key, value in tensors.items():
                torch.testing.assert_close(packed[name][site][key], value, atol=1e-10, rtol=0)


def test_a_run_taken_from_the_base_goes_on_from_its_state() -> None:
    recipe = make_recipe(
        method=lora(init_lora_weights="pissa", lora_dropout=0.1),
        train={"steps": 6, "batch_size": 4, "lr": 2e-3},
    )
    first = Trainer(MultiAdapterModel(exact_model()))
    first.join("own", recipe, ROWS)
    for _ in range(3):
        first.step()
    second = Trainer(MultiAdapterModel(exact_model()))
    second.join("own", recipe, ROWS, state=first.state("own"))
    for trainer in (first, second):
        while trainer.step():
            pass
    ends = [trainer.state("own").tensors for trainer in (first, second)]
    for site, tensors in ends[0].items():
        assert all(torch.equal(value, ends[1][site][key]) for key, value in tensors.items())


def test_layers_to_transform_is_pefts(tmp_path: Path) -> None:
    upper = lora(layers_to_transform=[1])
    same_logits_as_peft(upper, tmp_path)
    round_trip(upper, tmp_path)
    everywhere = lora(target_modules="all-linear", layers_to_transform=[1])
    same_logits_as_peft(everywhere, tmp_path / "all")
    for number, given in enumerate((1, [1], [0, 1], [])):
        config = LoraConfig(
            r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"],
            layers_to_transform=given, task_type="CAUSAL_LM",
        )  # fmt: skip
        read = same_logits_here(config, tmp_path / str(number))
        assert isinstance(read.method, LoraMethod)
        assert read.method.layers_to_transform == {0: (1,), 1: (1,), 2: (0, 1), 3: None}[number]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"layers_to_transform": [2]}, "has no layer 2; its layers are 0 to 1"),
        (
            {"layers_to_transform": [0], "target_modules": ["layers.1.mlp.up_proj"]},
            r"no layer of \[0\] has one of method.target_modules",
        ),
    ],
)
def test_layers_that_are_not_there_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        lora(**settings).sites(MultiAdapterModel(tiny_model()).linears)


@pytest.mark.parametrize("given", [[], [-1], 3])
def test_layers_that_cannot_be_are_refused(given: Any) -> None:
    with pytest.raises(ValidationError, match="layers_to_transform"):
        lora(layers_to_transform=given)


def test_all_linear_leaves_out_gates_with_one_output() -> None:
    """Qwen2-MoE's `shared_expert_gate` has room for rank 1 only."""
    sizes = {"layers.0.mlp.shared_expert.up_proj": (64, 96), "layers.0.mlp.gate": (64, 1)}
    chosen = lora(target_modules="all-linear").sites(sizes)
    assert [site.name for site in chosen] == ["layers.0.mlp.shared_expert.up_proj"]
    named = lora(target_modules=["gate"], r=1).sites(sizes)
    assert [site.name for site in named] == ["layers.0.mlp.gate"]
