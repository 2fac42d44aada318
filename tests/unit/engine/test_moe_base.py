"""LoRA on a mixture-of-experts base: experts and routers by name, against a loop and PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from graft.compressors.base import Adapter
from graft.compressors.folder import load_adapter, save_adapter
from graft.core.errors import AdapterError, ConfigError
from graft.engine.merge import merge_into_base
from graft.engine.multi import AdapterTensors, MultiAdapterModel, Routing
from graft.engine.train import Trainer
from graft.methods.base import METHODS
from graft.methods.lora import LoraMethod
from graft.testing import tiny_moe
from tests.unit.engine.conftest import make_recipe, make_rows

IDS = torch.arange(5, 29)[None] % 300
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
ARCHITECTURES = ("qwen3_moe", "mixtral")


def lora(*targets: str, r: int = 4) -> LoraMethod:
    return LoraMethod(r=r, lora_alpha=2.0 * r, target_modules=targets)


def stirred(model: MultiAdapterModel, method: LoraMethod, seed: int = 0) -> AdapterTensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        site: {k: v + 0.1 * torch.randn(v.shape, generator=generator) for k, v in of_site.items()}
        for site, of_site in model.fresh_tensors(method).items()
    }


def logits(model: MultiAdapterModel, *slots: str | None) -> torch.Tensor:
    routing = Routing(slots, (1,) * len(slots))
    return model.logits(model.hidden(IDS.expand(len(slots), -1), routing=routing))


def with_naive_experts(
    base: PreTrainedModel, tensors: AdapterTensors, scale: float
) -> PreTrainedModel:
    """The oracle: each token and each of its experts one at a time, as the formula says."""

    def forward(experts: Any, layer: int) -> Any:
        def adapted(x: torch.Tensor, expert: int, projection: str) -> torch.Tensor:
            out = getattr(experts, projection)[expert] @ x
            own = tensors.get(f"model.layers.{layer}.mlp.experts.{expert}.{projection}")
            if own is not None:
                out = out + scale * (own["lora_B"].to(x) @ (own["lora_A"].to(x) @ x))
            return out

        def of_tokens(
            hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
        ) -> torch.Tensor:
            rows = []
            for x, chosen, of_token in zip(hidden, index.tolist(), weights, strict=True):
                row = torch.zeros_like(x)
                for expert, weight in zip(chosen, of_token, strict=True):
                    gate, up = adapted(x, expert, "gate_up_proj").chunk(2)
                    inner = torch.nn.functional.silu(gate) * up
                    row = row + weight * adapted(inner, expert, "down_proj")
                rows.append(row)
            return torch.stack(rows)

        return of_tokens

    for at, layer in enumerate(base.model.layers):
        layer.mlp.experts.forward = forward(layer.mlp.experts, at)
    return base


@torch.no_grad()
def test_an_expert_and_its_router_are_layers_by_name() -> None:
    model = MultiAdapterModel(tiny_moe())
    assert model.linears["model.layers.0.mlp.experts.3.down_proj"] == (48, 64)
    assert model.linears["model.layers.1.mlp.experts.0.gate_up_proj"] == (64, 96)
    assert model.linears["model.layers.1.mlp.gate"] == (64, 4)
    sites = {site.name for site in lora("experts.3.down_proj", "gate").sites(model.linears)}
    assert sites == {
        f"model.layers.{at}.mlp.{part}" for at in (0, 1) for part in ("experts.3.down_proj", "gate")
    }
    everything = LoraMethod(r=4).sites(model.linears)
    assert {site.name.rpartition(".")[2] for site in everything} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }


@torch.no_grad()
@pytest.mark.parametrize(
    "targets", [EXPERTS, ("experts.2.down_proj",), ("mlp.experts.gate_up_proj",)]
)
def test_experts_compute_what_a_loop_over_tokens_does(targets: tuple[str, ...]) -> None:
    model = MultiAdapterModel(tiny_moe(dtype=torch.float64))
    method = lora(*targets)
    tensors = stirred(model, method)
    model.add_slot("a", method, tensors=tensors)
    naive = with_naive_experts(tiny_moe(dtype=torch.float64), tensors, method.scale)
    expected = naive(input_ids=IDS).logits
    torch.testing.assert_close(logits(model, "a"), expected, rtol=0, atol=1e-6)
    assert (expected - logits(model, None)).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_experts_and_router_give_the_logits_of_pefts_target_parameters(architecture: str) -> None:
    model = MultiAdapterModel(tiny_moe(architecture=architecture))
    method = lora(*EXPERTS, "mlp.gate")
    tensors = stirred(model, method)
    model.add_slot("ours", method, tensors=tensors)
    theirs = get_peft_model(
        tiny_moe(architecture=architecture),
        LoraConfig(
            r=method.r,
            lora_alpha=method.lora_alpha,
            target_modules=[],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "gate.weight"],
        ),
    )
    fill_peft(theirs, tensors)
    torch.testing.assert_close(
        logits(model, "ours"), theirs(input_ids=IDS).logits, rtol=0, atol=1e-5
    )


def fill_peft(model: Any, tensors: AdapterTensors) -> None:
    """Writes pairs into PEFT's layout: A is `[experts * r, in]`, B `[out, r * experts]`."""
    for name, module in model.named_modules():
        if not hasattr(module, "parameter_name"):
            continue
        path = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if module.parameter_name == "weight":
            pairs = [tensors[path]]
        else:
            count = module.num_experts
            pairs = [tensors[f"{path}.{at}.{module.parameter_name}"] for at in range(count)]
        a = torch.cat([pair["lora_A"] for pair in pairs])
        b = torch.stack([pair["lora_B"] for pair in pairs], dim=-1).flatten(1)
        module.lora_A["default"].weight.copy_(a)
        module.lora_B["default"].weight.copy_(b)


@torch.no_grad()
def test_rows_of_other_slots_do_not_matter() -> None:
    model = MultiAdapterModel(tiny_moe(dtype=torch.float64))
    for seed, (name, method) in enumerate(
        {
            "experts": lora(*EXPERTS),
            "one": lora("experts.1.down_proj", "q_proj", r=2),
            "router": lora("mlp.gate", r=3),
        }.items()
    ):
        model.add_slot(name, method, tensors=stirred(model, method, seed))
    names = (None, "experts", "one", "router")
    alone = torch.cat([logits(model, name) for name in names])
    torch.testing.assert_close(logits(model, *names), alone, rtol=0, atol=1e-6)
    assert (alone[1:] - alone[:1]).abs().amax((1, 2)).min() > 1e-3


@pytest.mark.parametrize("lengths", [(12, 12), (5, 30)], ids=["even", "uneven"])
def test_packed_trials_end_with_the_weights_of_the_same_trials_alone(
    lengths: tuple[int, int], threads: Callable[[int], None]
) -> None:
    threads(2)  # micro-batches run side by side in the same modules
    rows = make_rows(16, lengths=lengths)
    targets = {"a": (*EXPERTS, "mlp.gate"), "b": ("experts.down_proj", "q_proj"), "c": ("v_proj",)}
    recipes = {
        name: make_recipe(
            method={"type": "lora", "r": 2, "target_modules": list(wanted)},
            train={"steps": 5, "batch_size": 4, "lr": 2e-3, "seed": at},
        )
        for at, (name, wanted) in enumerate(targets.items())
    }

    def trained(names: tuple[str, ...]) -> dict[str, AdapterTensors]:
        trainer = Trainer(MultiAdapterModel(tiny_moe(dtype=torch.float64)))
        for name in names:
            trainer.join(name, recipes[name], rows)
        while trainer.step():
            pass
        return {name: trainer.state(name).tensors for name in names}

    packed = trained(tuple(recipes))
    for name in recipes:
        alone = trained((name,))[name]
        for site, of_site in alone.items():
            for key, value in of_site.items():
                # transformers' RMSNorm and router round to fp32 inside.
                torch.testing.assert_close(packed[name][site][key], value, rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_merged_into_the_fused_weights_it_answers_the_same(architecture: str) -> None:
    model = MultiAdapterModel(tiny_moe(architecture=architecture))
    method = lora(*EXPERTS, "mlp.gate", "o_proj")
    tensors = stirred(model, method)
    model.add_slot("apart", method, tensors=tensors)
    merged = merge_into_base(tiny_moe(architecture=architecture), Adapter(method, tensors))
    torch.testing.assert_close(
        logits(model, "apart"), merged(input_ids=IDS).logits, rtol=1e-4, atol=1e-4
    )


@torch.no_grad()
def test_saved_and_loaded_it_answers_the_same(tmp_path: Any) -> None:
    model = MultiAdapterModel(tiny_moe())
    method = lora(*EXPERTS, "mlp.gate", "o_proj")
    tensors = stirred(model, method)
    save_adapter(tmp_path / "adapter", Adapter(method, tensors), "tiny")
    loaded = load_adapter(tmp_path / "adapter")
    model.add_slot("before", method, tensors=tensors)
    model.add_slot("after", loaded.method, tensors=loaded.tensors)
    assert torch.equal(logits(model, "before"), logits(model, "after"))


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "targets", [(*EXPERTS, "mlp.gate", "o_proj"), ("layers.1.mlp.experts.gate_up_proj",)]
)
def test_peft_reads_the_folder_and_its_folder_is_read(
    architecture: str, targets: tuple[str, ...], tmp_path: Any
) -> None:
    model = MultiAdapterModel(tiny_moe(architecture=architecture))
    method = lora(*targets)
    model.add_slot("ours", method, tensors=stirred(model, method))
    adapter = Adapter(method, model.tensors("ours"))
    model.base.config.save_pretrained(tmp_path / "base")
    save_adapter(tmp_path / "ours", adapter, str(tmp_path / "base"))
    theirs = PeftModel.from_pretrained(tiny_moe(architecture=architecture), str(tmp_path / "ours"))
    expected = theirs(input_ids=IDS).logits
    torch.testing.assert_close(logits(model, "ours"), expected, rtol=0, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = load_adapter(tmp_path / "theirs")
    model.add_slot("back", loaded.method, tensors=loaded.tensors)
    torch.testing.assert_close(logits(model, "back"), expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {"target_parameters": ["gate_up_proj", "down_proj"]},  # bare, as PEFT's conversion has them
        {"target_modules": r".*\.o_proj"},
    ],
)
def test_other_ways_to_name_the_same_experts_are_read(
    changes: dict[str, Any], tmp_path: Any
) -> None:
    model = MultiAdapterModel(tiny_moe())
    method = lora(*EXPERTS, "o_proj")
    model.add_slot("before", method, tensors=stirred(model, method))
    save_adapter(tmp_path / "adapter", Adapter(method, model.tensors("before")), "tiny")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    loaded = load_adapter(tmp_path / "adapter")
    model.add_slot("after", loaded.method, tensors=loaded.tensors)
    assert torch.equal(logits(model, "before"), logits(model, "after"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_parameters": "experts.down_proj"}, "must be a list of names"),
        ({"r": 0}, "r=0 must be a whole number above 0"),
        ({"r": 3}, "should be a multiple of r=3"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "does not name"),
    ],
)
def test_a_hostile_file_of_experts_is_refused(changes: dict[str, Any], message: str) -> None:
    model = MultiAdapterModel(tiny_moe())
    method = lora(*EXPERTS)
    config, state = method.to_peft(model.fresh_tensors(method), "tiny")
    with pytest.raises(AdapterError, match=message):
        LoraMethod.from_peft({**config, **changes}, state)


@torch.no_grad()
def test_the_base_is_as_it_was_when_the_last_slot_has_left() -> None:
    model = MultiAdapterModel(tiny_moe())
    before = logits(model, None)
    model.add_slot("a", lora(*EXPERTS), tensors=stirred(model, lora(*EXPERTS)))
    logits(model, "a")
    model.remove_slot("a")
    assert torch.equal(logits(model, None), before)


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ({"type": "dora"}, "method dora does not adapt it, method lora does"),
        ({"type": "lora", "lora_dropout": 0.1}, "there method.lora_dropout must be 0"),
        ({"type": "mixture", "r": 2}, "method mixture does not adapt it"),
    ],
)
def test_a_method_that_cannot_adapt_experts_says_so(method: dict[str, Any], reason: str) -> None:
    model = MultiAdapterModel(tiny_moe())
    targets = {"target_modules": ["q_proj", "experts.down_proj"]}
    with pytest.raises(ConfigError, match=reason):
        model.add_slot("a", METHODS.build({**method, **targets}))


def test_a_bare_name_means_no_expert_and_the_near_name_is_told() -> None:
    model = MultiAdapterModel(tiny_moe())
    with pytest.raises(ConfigError, match=r"near names: .*experts\.down_proj"):
        model.add_slot("a", lora("down_proj"))


def test_layers_to_transform_does_not_pick_experts() -> None:
    model = MultiAdapterModel(tiny_moe())
    method = lora("q_proj", *EXPERTS).model_copy(update={"layers_to_transform": (1,)})
    with pytest.raises(ConfigError, match=r"layers_to_transform: .* is an expert or router"):
        method.sites(model.linears)
    only = lora("q_proj").model_copy(update={"layers_to_transform": (1,)})
    assert [site.name for site in only.sites(model.linears)] == ["model.layers.1.self_attn.q_proj"]
