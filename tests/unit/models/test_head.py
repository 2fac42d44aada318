"""Logits as transformers makes them, for bases that do more than apply a head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from graft.core.errors import ModelError
from graft.engine.multi import MultiAdapterModel, Routing
from graft.models.head import require_known_head

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
IDS = torch.arange(5, 17)[None]


def base_of(architecture: str, **settings: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(architecture, **{**SIZES, **settings})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.eval()


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("llama", {}),
        ("granite", {"logits_scaling": 8.0}),
        ("cohere", {"logit_scale": 0.0625}),
        ("cohere2", {"logit_scale": 0.25, "sliding_window": 64}),
        ("gemma2", {"final_logit_softcapping": 0.5, "sliding_window": 64}),
        ("hyperclovax", {"logits_scaling": 0.125}),
    ],
)
@torch.no_grad()
def test_logits_are_those_of_the_architecture(architecture: str, settings: dict[str, Any]) -> None:
    base = base_of(architecture, **settings)
    expected = base(input_ids=IDS).logits
    require_known_head(base)
    model = MultiAdapterModel(base)
    logits = model.logits(model.hidden(IDS, routing=Routing.single(None, 1)))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)


def test_a_base_with_an_unknown_head_is_refused() -> None:
    base = base_of("llama")
    forward = base.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = output.logits * 3
        return output

    base.forward = scaled
    with pytest.raises(ModelError, match="LlamaForCausalLM makes its logits in a way"):
        require_known_head(base)
