"""What is advised for the published pairs of model and GPU, and what the published advice takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from graft.core.errors import ConfigError
from graft.engine.memory.cap import Limits, MemoryCap
from graft.engine.memory.fit import apply
from graft.engine.memory.hardware import parse_hardware
from graft.engine.memory.shape import ModelShape
from graft.pipelines.advise import Advice, advise, advise_for, plain_recipe
from graft.recipe.load import load_recipe

GIB = 2**30
LLAMA = {
    "13B": (5120, 13824, 40, 40),
    "30B": (6656, 17920, 60, 52),
    "65B": (8192, 22016, 80, 64),
    "175B": (12288, 33024, 96, 96),
}
"""Name → hidden size, width of the MLP, layers, heads."""

CHECKPOINTING = {"scale.gradient_checkpointing": True}
NF4 = {"model.quantization.type": "nf4"}
ZERO_3 = {"scale.zero_stage": 3}
OPTIMIZER_ON_CPU = {**ZERO_3, "scale.offload.optimizer": "cpu"}
ALL_ON_CPU = {**OPTIMIZER_ON_CPU, "scale.offload.parameters": "cpu"}


def shape_of(name: str) -> ModelShape:
    hidden, width, layers, heads = LLAMA[name]
    return ModelShape(
        LlamaConfig(
            vocab_size=32000,
            hidden_size=hidden,
            intermediate_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            dtype="bfloat16",
        )
    )


def cap_of(name: str, gpu: str, host_bytes: int) -> tuple[MemoryCap, int]:
    hardware = parse_hardware(gpu)
    limits = Limits("cuda", hardware.gpu.memory_bytes, host_bytes, node_workers=1)
    return MemoryCap(shape_of(name), limits), hardware.count


def advice(name: str, gpu: str, method: str, host_bytes: int = 200 * GIB) -> Advice:
    cap, devices = cap_of(name, gpu, host_bytes)
    recipe = plain_recipe(name, method, devices=devices)
    return advise_for(recipe, cap, hardware=gpu, devices=devices)


def why_not(
    name: str, gpu: str, method: str, changes: dict[str, Any], host_bytes: int = 200 * GIB
) -> str | None:
    """What refuses a combination on some GPUs, one a worker."""
    cap, devices = cap_of(name, gpu, host_bytes)
    recipe = apply(plain_recipe(name, method, devices=devices), changes)
    assert recipe is not None
    return cap.refusal(recipe)


@pytest.mark.parametrize(("name", "count"), [("13B", 13.0e9), ("30B", 32.5e9), ("65B", 65.3e9)])
def test_the_shapes_have_the_published_numbers_of_parameters(name: str, count: float) -> None:
    assert shape_of(name).num_parameters == pytest.approx(count, rel=0.01)


@pytest.mark.parametrize("gpu", ["RTX 3090", "RTX 4090"])
def test_below_24_gb_13b_trains_with_qlora_and_checkpointing(gpu: str) -> None:
    """The published combination fits; ZeRO-3 and offload, which it adds, are not needed."""
    published = {**NF4, **ALL_ON_CPU, **CHECKPOINTING}
    assert why_not("13B", gpu, "lora", published, host_bytes=64 * GIB) is None
    given = advice("13B", gpu, "lora", host_bytes=64 * GIB)
    assert given.device_bytes < 20e9
    assert given.changes["model.quantization.type"] == "nf4"
    assert "scale.zero_stage" not in given.changes
    assert why_not("13B", gpu, "lora", {**NF4, **CHECKPOINTING}, host_bytes=64 * GIB) is None


def test_30b_fits_in_4_bits_below_24_gb_and_65b_does_not() -> None:
    assert why_not("30B", "RTX 4090", "lora", {**NF4, **CHECKPOINTING}, 64 * GIB) is None
    assert why_not("65B", "RTX 4090", "lora", {**NF4, **CHECKPOINTING}, 200 * GIB) is not None


def test_30b_on_40_gb_takes_4_bits_because_a_base_is_loaded_whole_before_it_is_divided() -> None:
    for gpu in ("A100-40GB", "4x A100-40GB"):
        reason = why_not("30B", gpu, "lora", {**ZERO_3, **CHECKPOINTING})
        assert reason is not None
    assert "(loading): weights" in str(reason)
    assert why_not("30B", "A100-40GB", "lora", {**NF4, **CHECKPOINTING}) is None


@pytest.mark.parametrize(("name", "gpu"), [("65B", "8x A100-80GB"), ("175B", "16x H100")])
def test_full_tuning_of_65b_and_more_does_not_fit_with_moments_on_the_host(
    name: str, gpu: str
) -> None:
    reason = why_not(name, gpu, "full", {**OPTIMIZER_ON_CPU, **CHECKPOINTING}, 2000 * GIB)
    assert reason is not None
    assert "training step" in reason


def test_advice_is_a_recipe_that_loads_and_fits(tmp_path: Path, data_folder: Path) -> None:
    shape_of("13B").config.save_pretrained(tmp_path / "model")
    given = advise(str(tmp_path / "model"), home=tmp_path, gpu="RTX 4090")
    path = tmp_path / "recipe.yaml"
    text = given.recipe
    for name in ("train", "eval"):
        text = text.replace(f"data/{name}.jsonl", str(data_folder / f"{name}.jsonl"))
    path.write_text(text)
    recipe = load_recipe(path).recipe()
    assert recipe.model.quantization.type == "nf4"
    cap, _ = cap_of("13B", "RTX 4090", 64 * GIB)
    assert cap.predict(recipe).device_bytes == given.device_bytes <= given.device_memory


def test_what_cannot_be_is_said_with_its_figures() -> None:
    with pytest.raises(ConfigError, match=r"nothing fits 65B on RTX 3090 .*--host-memory"):
        advice("65B", "RTX 3090", "full", host_bytes=64 * GIB)


def test_another_method_is_advised_with_its_own_learning_rate() -> None:
    found = advice("13B", "RTX 4090", "full", host_bytes=64 * GIB)
    assert found.changes["method"] == {"type": "lora"}
    recipe = apply(plain_recipe("13B", "full", devices=1), found.changes)
    assert recipe is not None
    assert recipe.train.lr == type(recipe.method).default_lr
    assert "lr:" not in found.recipe
