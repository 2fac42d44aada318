"""What a recipe takes, put together."""

from __future__ import annotations

import time
from typing import Any

import pytest
from transformers import LlamaConfig

from graft.engine.memory import MemoryEstimate, ModelShape, Workload, predict_memory
from graft.methods.peft import PeftMethod
from graft.recipe.sections import Recipe
from graft.testing import tiny_model, tiny_moe

WORK = Workload(rows=2, row_tokens=16, supervised_tokens=16)
LLAMA_2_70B = LlamaConfig(
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
)


def recipe_of(**sections: Any) -> Recipe:
    base: dict[str, Any] = {"model": {"source": "tiny"}, "data": {"train": "rows.jsonl"}}
    return Recipe.model_validate({**base, **sections})


def standing_bytes(estimate: MemoryEstimate, place: str = "device") -> dict[str, int]:
    (moment,) = (m for m in estimate.moments if m.name == "training step")
    found: dict[str, int] = {}
    for part in moment.parts:
        if part.place == place:
            found[part.name] = found.get(part.name, 0) + part.size_bytes
    return found


@pytest.mark.parametrize(
    ("stage", "gradients", "moments"), [(0, 4.0, 8.0), (1, 4.0, 2.0), (2, 1.0, 2.0), (3, 1.0, 2.0)]
)
def test_zero_divides_the_sixteen_bytes_of_a_weight_as_its_paper_says(
    stage: int, gradients: float, moments: float
) -> None:
    """Figure 1 of arXiv 1910.02054, for fp32 and four workers."""
    shape = ModelShape.of(tiny_model().config)
    recipe = recipe_of(
        method={"type": "full"},
        model={"source": "tiny", "dtype": "fp32"},
        scale={"workers": 4, "zero_stage": stage},
    )
    work = WORK._replace(num_micro_batches=2)
    found = standing_bytes(predict_memory(recipe, shape, "cpu", work=work))
    count = shape.num_parameters
    whole = 4 * count if stage < 3 else count
    assert found["gradients"] == pytest.approx(gradients * count)
    assert found["optimizer"] == pytest.approx(moments * count)
    assert found["weights"] == pytest.approx(whole, rel=1e-3)


def test_offloaded_moments_lie_on_the_host_or_on_nvme() -> None:
    shape = ModelShape.of(tiny_model().config)

    def found(place: str) -> MemoryEstimate:
        offload = {"optimizer": place, "nvme_path": "/fast"}
        scale = {"workers": 2, "zero_stage": 3, "offload": offload}
        return predict_memory(recipe_of(scale=scale), shape, "cuda", work=WORK)

    adapter = standing_bytes(found("none"))["adapter"]
    assert "optimizer" not in standing_bytes(found("cpu"))
    assert standing_bytes(found("cpu"), "host")["optimizer"] == 2 * adapter
    assert standing_bytes(found("nvme"), "nvme")["optimizer"] == 2 * adapter
    assert found("none").nvme_bytes == 0 < found("nvme").nvme_bytes


def test_moments_in_eight_bits_take_a_quarter() -> None:
    shape = ModelShape.of(tiny_model().config)
    of = {
        name: predict_memory(recipe_of(train={"optimizer": name}), shape, "cuda", work=WORK)
        for name in ("adamw", "adamw_8bit", "paged_adamw")
    }
    plain = standing_bytes(of["adamw"])["optimizer"]
    # One byte and a 256th of a 32-bit constant for each of two moments, arXiv 2110.02861.
    assert standing_bytes(of["adamw_8bit"])["optimizer"] == pytest.approx(
        plain / 4 * (1 + 4 / 256), abs=2
    )
    assert standing_bytes(of["paged_adamw"], "host")["optimizer"] == plain


def test_slots_of_a_pack_share_the_base_and_nothing_else() -> None:
    shape = ModelShape.of(tiny_model().config)
    one, four = (
        standing_bytes(predict_memory(recipe_of(), shape, "cpu", work=WORK, slots=slots))
        for slots in (1, 4)
    )
    assert four["weights"] == one["weights"]
    assert four["adapter"] == 4 * one["adapter"]
    assert four["optimizer"] == 4 * one["optimizer"]


def test_a_method_that_owns_the_base_pays_for_its_reference() -> None:
    shape = ModelShape.of(tiny_model().config)
    preferences = {"objective": {"type": "dpo"}, "data": {"train": "pairs.jsonl"}}
    whole = recipe_of(method={"type": "full"}, **preferences)
    found = standing_bytes(predict_memory(whole, shape, "cpu", work=WORK))
    assert found["reference"] == sum(shape.weight_bytes(whole.model))
    adapter = predict_memory(recipe_of(**preferences), shape, "cpu", work=WORK)
    assert "reference" not in standing_bytes(adapter)


def test_generated_answers_have_a_cache_of_keys_and_values() -> None:
    shape = ModelShape.of(tiny_model().config)
    recipe = recipe_of(
        data={"train": "rows.jsonl", "eval": "held.jsonl", "max_length": 96},
        eval={"metrics": ["exact_match"], "max_new_tokens": 32, "batch_size": 4},
    )
    estimate = predict_memory(recipe, shape, "cpu", work=WORK)
    (moment,) = (m for m in estimate.moments if m.name == "generation")
    (cache,) = (part for part in moment.parts if part.name == "kv cache")
    # Layers, keys and values, rows, heads, tokens, head size, bf16.
    assert cache.size_bytes == 2 * 2 * 4 * 2 * (96 + 32) * 16 * 2


def test_llama_2_70b_is_answered_in_seconds_without_its_weights() -> None:
    recipe = recipe_of(
        model={"source": "meta-llama/Llama-2-70b-hf", "quantization": {"type": "nf4"}},
        scale={"gradient_checkpointing": True},
        data={"train": "rows.jsonl", "max_length": 512},
    )
    began = time.process_time()
    estimate = predict_memory(recipe, ModelShape.of(LLAMA_2_70B), "cuda")
    assert time.process_time() - began < 20
    # The paper fits 65 billion weights and their fine-tuning into one GPU of 48 GB.
    assert 36e9 < estimate.device_bytes < 51e9


def test_rows_that_are_known_give_no_more_than_their_bound() -> None:
    from tests.unit.engine.conftest import make_rows

    recipe = recipe_of(data={"train": "x", "max_length": 64}, train={"micro_batch_tokens": 256})
    bound = Workload.bound(recipe)
    known = Workload.of_rows(recipe, make_rows(40, lengths=(10, 64)))
    assert (bound.rows, bound.row_tokens, bound.num_micro_batches) == (4, 64, 2)
    assert known.tokens <= bound.tokens
    assert known.supervised_tokens < bound.supervised_tokens


def test_an_estimate_says_its_largest_parts() -> None:
    shape = ModelShape.of(tiny_model().config)
    words = predict_memory(recipe_of(), shape, "cuda", work=WORK).in_words()
    assert "CUDA context 534 MB" in words


@pytest.mark.parametrize("targets", ["all-linear", ["experts.down_proj"]])
def test_a_base_of_experts_is_predicted_with_and_without_adapters_on_them(targets: Any) -> None:
    shape = ModelShape.of(tiny_moe().config)
    recipe = recipe_of(method={"type": "lora", "r": 4, "target_modules": targets})
    found = standing_bytes(predict_memory(recipe, shape, "cpu", work=WORK))
    per_expert = 4 * 4 * (48 + 64)
    assert found["activations"] > 0
    assert targets == "all-linear" or found["adapter"] == 2 * 4 * per_expert


PEFT_TYPES = ("VERA", "OFT", "RANDLORA", "LN_TUNING")


@pytest.mark.parametrize("peft_type", PEFT_TYPES)
def test_a_method_of_peft_trains_what_peft_trains_and_the_base_stands_once(peft_type: str) -> None:
    method = PeftMethod(peft_type=peft_type)
    real = method.attach(tiny_model(), seed=0).parameters.values()
    trained = sum(p.numel() for p in real if p.requires_grad)
    shape = ModelShape.of(tiny_model().config)
    recipe = recipe_of(method=method.model_dump(), model={"source": "tiny", "dtype": "fp32"})
    found = standing_bytes(predict_memory(recipe, shape, "cpu", work=WORK))
    assert found["optimizer"] == 8 * trained
    assert found["gradients"] == 4 * trained
    assert found["weights"] == pytest.approx(4 * shape.num_parameters, rel=1e-3)
    if peft_type == "VERA":  # its random projections are saved beside
        assert found["adapter"] == 4 * sum(p.numel() for p in real)


def test_a_method_that_peft_makes_of_values_is_predicted_too() -> None:
    shape = ModelShape.of(tiny_model().config)
    boft = recipe_of(method={"type": "peft", "peft_type": "BOFT"})
    full = recipe_of(method={"type": "full"})
    estimate = predict_memory(boft, shape, "cpu", work=WORK)
    assert standing_bytes(estimate)["optimizer"] > 0
    assert estimate.device_bytes < predict_memory(full, shape, "cpu", work=WORK).device_bytes
