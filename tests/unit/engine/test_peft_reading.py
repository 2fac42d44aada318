"""PEFT itself reads adapter folders on the base's shape: what it would leave out is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from graft.compressors.base import Adapter
from graft.compressors.folder import save_adapter
from graft.core.errors import AdapterError
from graft.engine.memory.shape import ModelShape
from graft.engine.multi import MultiAdapterModel
from graft.engine.peft_reading import require_taken_by_peft
from graft.methods.dora import DoraMethod
from graft.methods.lora import LoraMethod
from graft.testing import tiny_model, tiny_moe

DENSE = "model.layers.0.mlp.down_proj"


def save(folder: Path, base: PreTrainedModel, method: LoraMethod | DoraMethod) -> ModelShape:
    tensors = MultiAdapterModel(base).fresh_tensors(method)
    save_adapter(folder, Adapter(method, tensors), "base")
    return ModelShape.of(base.config)


def half_dense() -> PreTrainedModel:
    """A mixture of experts whose first layer is dense."""
    config = tiny_moe().config
    config.mlp_only_layers = [0]
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    "method",
    [
        LoraMethod(r=4),
        LoraMethod(r=4, use_rslora=True, target_modules=("q_proj", "layers.1.mlp.up_proj")),
        DoraMethod(r=4),
    ],
)
def test_peft_takes_all_of_what_it_understands(
    method: LoraMethod | DoraMethod, tmp_path: Path
) -> None:
    require_taken_by_peft(tmp_path / "a", save(tmp_path / "a", tiny_model(), method))


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral"])
def test_peft_takes_experts_and_routers_that_its_conversion_knows(
    architecture: str, tmp_path: Path
) -> None:
    method = LoraMethod(r=4, target_modules=("experts.gate_up_proj", "experts.down_proj", "o_proj"))
    shape = save(tmp_path / "a", tiny_moe(architecture=architecture), method)
    require_taken_by_peft(tmp_path / "a", shape)


def test_an_adapter_of_which_peft_leaves_tensors_out_is_refused(tmp_path: Path) -> None:
    shape = save(tmp_path / "a", half_dense(), LoraMethod(r=4, target_modules=(DENSE, "o_proj")))
    with pytest.raises(AdapterError, match=r"leave \d+ tensors .*down_proj.* --format merged"):
        require_taken_by_peft(tmp_path / "a", shape)


def test_it_is_indeed_another_model_that_peft_makes_of_it(tmp_path: Path) -> None:
    base, method = half_dense(), LoraMethod(r=4, target_modules=(DENSE,))
    model = MultiAdapterModel(base)
    generator = torch.Generator().manual_seed(0)
    tensors: Any = {
        site: {k: torch.randn(v.shape, generator=generator) for k, v in of_site.items()}
        for site, of_site in model.fresh_tensors(method).items()
    }
    save_adapter(tmp_path / "a", Adapter(method, tensors), "base")
    weights = base.state_dict()
    theirs = half_dense()
    theirs.load_state_dict(weights)
    ids = torch.arange(5, 29)[None]
    with pytest.raises(AdapterError):
        require_taken_by_peft(tmp_path / "a", ModelShape.of(base.config))
    with pytest.warns(UserWarning, match="missing adapter keys"):
        loaded = PeftModel.from_pretrained(theirs, str(tmp_path / "a"))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, base(ids).logits)
