"""Bases that are built otherwise than Llama: adapted rightly, or refused in words."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from graft.compressors.base import Adapter
from graft.compressors.folder import load_adapter, save_adapter
from graft.core.errors import ConfigError, ModelError
from graft.engine.generate import GenerationRequest, Generator
from graft.engine.memory import ModelShape
from graft.engine.multi import AdapterTensors, MultiAdapterModel, Routing
from graft.engine.multi.attention import takes_any_mask
from graft.methods.lora import LoraMethod
from graft.methods.prompt import PromptMethod
from graft.testing import tiny_tokenizer

SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "pad_token_id": 0}
SMALL: dict[str, dict[str, Any]] = {
    "opt": {
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    },
    "qwen2_moe": {
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
    },
    "deepseek_v3": {
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "n_routed_experts": 4,
    },
    "granitemoehybrid": {
        "intermediate_size": 48,
        "shared_intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 0,
        "layer_types": ["attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
    },
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 4},
    "gpt_neo": {
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
        "intermediate_size": 48,
    },
    "gemma2": {
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    },
    "phimoe": {
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
    },
    "lfm2_moe": {
        "intermediate_size": 48,
        "moe_intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_dense_layers": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["full_attention", "full_attention"],
    },
    "phi3": {
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "original_max_position_embeddings": 16,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0] * 4,
            "long_factor": [3.0] * 4,
        },
    },
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 1, "max_seq_len": 64},
    "rwkv": {"num_hidden_layers": 2, "attention_hidden_size": 32},
}
IDS = torch.arange(5, 29).reshape(2, 12)
ALL = LoraMethod(r=2, lora_alpha=4, target_modules="all-linear")


def base_of(architecture: str, **settings: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(architecture, **SIZES, **SMALL[architecture], **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    base: PreTrainedModel = model.float().eval()
    return base


def drawn(
    model: MultiAdapterModel, method: LoraMethod, generator: torch.Generator
) -> AdapterTensors:
    """Tensors of an adapter that changes what the base says."""
    return {
        site: {key: torch.randn(v.shape, generator=generator) * 0.1 for key, v in own.items()}
        for site, own in model.fresh_tensors(method).items()
    }


@pytest.mark.parametrize("architecture", ["opt", "qwen2_moe", "deepseek_v3"])
@torch.no_grad()
def test_every_layer_is_adapted_whatever_form_its_input_has(architecture: str) -> None:
    """OPT and shared experts flatten rows, latent attention adds an axis: as merged weights do."""
    base = base_of(architecture)
    merged = copy.deepcopy(base)
    model = MultiAdapterModel(base)
    generator = torch.Generator().manual_seed(1)
    slots = {}
    for name in ("a", "b"):
        slots[name] = drawn(model, ALL, generator)
        model.add_slot(name, ALL, tensors=slots[name])
    logits = model.logits(model.hidden(IDS, routing=Routing(("a", "b"), (1, 1))))
    for row, name in enumerate(("a", "b")):
        alone = copy.deepcopy(merged)
        for site, own in slots[name].items():
            weight = alone.get_submodule(site).weight
            weight += 2.0 * (own["lora_B"] @ own["lora_A"])
        expected = alone(input_ids=IDS[row : row + 1]).logits
        torch.testing.assert_close(logits[row : row + 1], expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("architecture", "router"), [("phimoe", "mlp.router"), ("lfm2_moe", "feed_forward.gate")]
)
@torch.no_grad()
def test_a_router_is_one_whatever_it_is_made_of_and_given(architecture: str, router: str) -> None:
    """Phi's is a linear layer that gives a pair, LFM2's gets a bias beside its input."""
    base = base_of(architecture)
    merged = copy.deepcopy(base)
    model = MultiAdapterModel(base)
    assert not any(site.name.endswith(router) for site in ALL.sites(model.linears))
    model.add_slot("all", ALL)
    method = LoraMethod(r=2, lora_alpha=4, target_modules=(router,))
    generator = torch.Generator().manual_seed(1)
    tensors = drawn(model, method, generator)
    model.add_slot("router", method, tensors=tensors)
    logits = model.logits(model.hidden(IDS, routing=Routing(("all", "router"), (1, 1))))
    assert len(tensors) == 1
    for site, own in tensors.items():
        weight = merged.get_submodule(site).weight
        expected = [merged(input_ids=IDS[:1]).logits]  # fresh adapters change nothing
        weight += 2.0 * (own["lora_B"] @ own["lora_A"])
        expected.append(merged(input_ids=IDS[1:]).logits)
        torch.testing.assert_close(logits, torch.cat(expected), rtol=0, atol=2e-5)


@torch.no_grad()
def test_experts_are_saved_beside_plain_layers_of_the_same_name(tmp_path: Path) -> None:
    model = MultiAdapterModel(base_of("qwen2_moe"))
    targets = ("experts.down_proj", "shared_expert.down_proj", "o_proj")
    method = LoraMethod(r=2, lora_alpha=4, target_modules=targets)
    model.add_slot("a", method)
    adapter = Adapter(method, model.tensors("a"))
    save_adapter(tmp_path / "adapter", adapter, "tiny")
    loaded = load_adapter(tmp_path / "adapter")
    model.add_slot("b", loaded.method, tensors=loaded.tensors)
    assert loaded.tensors.keys() == adapter.tensors.keys()


def test_a_base_without_linear_layers_is_refused() -> None:
    model = MultiAdapterModel(base_of("gpt2"))
    with pytest.raises(ConfigError, match="no linear layer below its head"):
        model.add_slot("a", ALL)


@pytest.mark.parametrize("architecture", ["gpt_neo", "rwkv"])
def test_bases_whose_layers_do_not_attend_to_all_tokens_are_not_generated_with(
    architecture: str,
) -> None:
    model = MultiAdapterModel(base_of(architecture))
    assert not takes_any_mask(model.base)
    with pytest.raises(ModelError, match=r"has layers of kind (local_attention|recurrent)"):
        Generator(model, tiny_tokenizer())


@torch.no_grad()
def test_a_hybrid_class_without_recurrent_layers_is_generated_with() -> None:
    base = base_of("granitemoehybrid")
    assert getattr(base, "_is_stateful", False)
    ids, expected = IDS[:1], []
    for _ in range(6):
        best = base(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        expected.append(int(best))
        ids = torch.cat([ids, best], dim=1)
    generator = Generator(MultiAdapterModel(base), tiny_tokenizer())
    asked = [GenerationRequest(IDS[row].tolist(), None, 6) for row in (1, 0)]
    assert list(generator.run(asked)[1].token_ids) == expected


def test_virtual_tokens_need_positions() -> None:
    model = MultiAdapterModel(base_of("mpt"))
    with pytest.raises(ModelError, match="'mpt' tells tokens apart by their columns"):
        model.add_slot("a", PromptMethod(num_virtual_tokens=4, init_tokens="random"))


@pytest.mark.parametrize("architecture", sorted(SMALL))
def test_the_shape_of_every_base_is_known(architecture: str) -> None:
    base = base_of(architecture)
    assert ModelShape.of(base.config).num_parameters == base.num_parameters()
