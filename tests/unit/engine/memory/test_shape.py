"""Sizes of a base from its configuration alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from graft.core.errors import ModelError
from graft.engine.memory import ModelShape
from graft.models.section import ModelSection, QuantizationSection
from graft.testing import save_tiny_model, tiny_model, tiny_moe

LLAMA_2: dict[str, dict[str, Any]] = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
    "13b": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
    },
    "70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
"""From the models' published `config.json` files."""


def llama_2(size: str) -> ModelShape:
    return ModelShape.of(LlamaConfig(**LLAMA_2[size]))


@pytest.mark.parametrize(("size", "billions"), [("7b", 6.738), ("13b", 13.016), ("70b", 68.977)])
def test_llama_2_has_the_parameters_that_its_authors_count(size: str, billions: float) -> None:
    assert llama_2(size).num_parameters / 1e9 == pytest.approx(billions, abs=5e-4)


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_a_loaded_base_occupies_what_its_shape_says(tmp_path: Path, quantization: str) -> None:
    from graft.models import ReadyModel, load_model

    section = ModelSection(
        source="tiny", device="cpu", quantization=QuantizationSection(type=quantization)
    )
    save_tiny_model(tmp_path)
    ready = ReadyModel(path=tmp_path, digest="", template_digest="", source="tiny")
    base = load_model(ready, section)
    weights = sum(p.nbytes for p in (*base.parameters(), *base.buffers()))
    constants = sum(constants_of(p) for p in base.parameters())
    assert ModelShape.of(tmp_path).weight_bytes(section) == (weights, constants)


def constants_of(weight: torch.Tensor) -> int:
    if hasattr(weight, "SCB"):
        return int(weight.SCB.nbytes)
    state = getattr(weight, "quant_state", None)
    if state is None:
        return 0
    return int(state.absmax.nbytes + state.state2.absmax.nbytes + state.offset.nbytes)


def test_double_quantization_takes_what_the_paper_says() -> None:
    section = QuantizationSection(type="nf4")
    shape = llama_2("7b")
    packed = ModelSection(source="x", quantization=section)
    dense = ModelSection(source="x")
    linear = sum(a * b for a, b in shape.linears.values())
    saved = sum(shape.weight_bytes(dense)) - sum(shape.weight_bytes(packed))
    # 4 bits a weight and 0.127 of constants, arXiv 2305.14314, section 3.
    assert 8 * (2 * linear - saved) / linear == pytest.approx(4.127, abs=1e-3)


def test_experts_and_routers_are_counted() -> None:
    moe = tiny_moe()
    shape = ModelShape.of(moe.config)
    assert shape.num_parameters == sum(p.numel() for p in moe.parameters())
    assert any("experts.3.down_proj" in name for name in shape.linears)


def test_equal_configurations_have_equal_keys() -> None:
    one, other = (ModelShape.of(tiny_model().config) for _ in range(2))
    assert one.key == other.key != ModelShape.of(tiny_model(num_layers=3).config).key


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        ModelShape.of(tmp_path)
