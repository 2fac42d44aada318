"""A base stored in 8 or 4 bits answers nearly as the whole one does."""

from __future__ import annotations

import gc
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from graft.core.errors import ConfigError, ModelError
from graft.models import ReadyModel, load_model, resolve_model
from graft.models.section import ModelSection


def make(folder: Path, **settings: Any) -> ModelSection:
    """A section for the folder."""
    return ModelSection.model_validate({"source": str(folder), "dtype": "fp32", **settings})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("quantization", "layer", "tolerance"),
    [
        ({"type": "int8"}, "Linear8bitLt", 0.05),
        ({"type": "nf4", "double": True}, "Linear4bit", 0.35),
        ({"type": "nf4", "double": False}, "Linear4bit", 0.35),
    ],
)
def test_a_quantized_base_stays_near_the_whole_one(
    quantization: dict[str, Any], layer: str, tolerance: float, model_folder: Path, tmp_path: Path
) -> None:
    whole = make(model_folder)
    ready = resolve_model(whole, tmp_path)
    section = make(model_folder, quantization=quantization)
    model = load_model(ready, section)
    bitsandbytes = importlib.import_module("bitsandbytes")
    projection = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert isinstance(projection, getattr(bitsandbytes.nn, layer))
    assert not any(weight.requires_grad for weight in model.parameters())
    ids = torch.arange(5, 29)[None]
    with torch.no_grad():
        theirs = model(input_ids=ids).logits.float()
        ours = load_model(ready, whole)(input_ids=ids).logits
    assert ((theirs - ours).norm() / ours.norm()).item() < tolerance


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="mappings are Linux's to tell")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_a_packed_base_lets_its_files_go(
    quantization: str, model_folder: Path, tmp_path: Path
) -> None:
    ready = resolve_model(make(model_folder), tmp_path)
    plain = load_model(ready, make(model_folder))
    assert str(ready.path) in Path("/proc/self/maps").read_text(), "the test would see no mapping"
    del plain
    gc.collect()
    model = load_model(ready, make(model_folder, quantization={"type": quantization}))
    gc.collect()
    assert str(ready.path) not in Path("/proc/self/maps").read_text()
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_fp64_and_quantization_exclude_each_other(model_folder: Path) -> None:
    with pytest.raises(ValidationError, match="exclude each other; use bf16, fp16 or fp32"):
        make(model_folder, dtype="fp64", quantization={"type": "nf4"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_refused(model_folder: Path, tmp_path: Path) -> None:
    section = make(model_folder, device="cuda")
    with pytest.raises(ConfigError, match="torch sees no GPU"):
        load_model(resolve_model(section, tmp_path), section)


def test_damaged_weights_are_refused(tmp_path: Path, model_folder: Path) -> None:
    for path in model_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    ready = ReadyModel(path=tmp_path, digest="", template_digest="", source="x")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(ready, make(tmp_path))
