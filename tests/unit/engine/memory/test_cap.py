"""What fits, and what runs that did not fit have taught."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graft.core.errors import ConfigError
from graft.core.sizes import format_bytes
from graft.engine.memory import ModelShape
from graft.engine.memory.cap import Limits, MemoryCap
from graft.engine.memory.estimate import _step_peaks
from graft.engine.memory.exhausted import exhausted_bytes
from graft.engine.memory.standing import size_of
from graft.recipe.sections import Recipe
from graft.testing import tiny_model

ROOM = 2**40


def recipe_of(**sections: Any) -> Recipe:
    base: dict[str, Any] = {
        "model": {"source": "tiny", "dtype": "fp32"},
        "data": {"train": "rows.jsonl", "max_length": 64},
    }
    return Recipe.model_validate({**base, **sections})


def cap_of(limits: Limits) -> MemoryCap:
    return MemoryCap(ModelShape.of(tiny_model().config), limits)


def test_what_slots_needed_together_is_what_they_are_predicted_to_need_from_then_on() -> None:
    cap = cap_of(Limits("cpu", ROOM))
    recipes = [recipe_of(method={"type": "lora", "r": rank}) for rank in (2, 8, 32, 4)]
    needed = round(1.3 * cap.need(recipes))
    words = cap.learn(recipes, needed)
    assert "4 trials on one base needed at least" in words
    assert cap.need(recipes) == pytest.approx(needed, rel=0.05)
    assert cap.need(recipes) >= needed


def test_a_process_killed_on_a_cpu_has_reached_its_limit_where_that_is_plausible() -> None:
    recipe = recipe_of()
    need = cap_of(Limits("cpu", ROOM)).need([recipe])
    cap = cap_of(Limits("cpu", round(1.1 * need)))
    assert "predictions are multiplied by" in cap.learn([recipe], 0)
    assert cap.need([recipe]) > 1.1 * need
    cap = cap_of(Limits("cpu", round(3 * need)))
    assert "something else holds memory on this node" in cap.learn([recipe], 0)
    assert cap.factor == 1.0


def test_a_cap_of_the_recipe_is_not_what_a_killed_process_had_reached() -> None:
    recipe = recipe_of()
    need = cap_of(Limits("cpu", ROOM)).need([recipe])
    capped = recipe_of(scale={"device_memory": f"{round(1.5 * need)}B"})
    cap = cap_of(Limits("cpu", ROOM))
    assert "something else" in cap.learn([capped], 0)
    assert cap.factor == 1.0


def test_a_process_killed_for_its_hosts_memory_says_nothing_of_its_gpu() -> None:
    cap = cap_of(Limits("cuda", 10**10, 10**11))
    assert "says nothing of its device" in cap.learn([recipe_of()], 0)
    assert cap.factor == 1.0
    assert "multiplied by" in cap.learn([recipe_of()], 10**11)


def test_what_torch_counts_on_a_gpu_is_without_its_context() -> None:
    cap, recipe = cap_of(Limits("cuda", 10**11)), recipe_of()
    counted = 3 * cap.beside_process(recipe)
    cap.learn([recipe], counted)
    assert cap.beside_process(recipe) == pytest.approx(counted, rel=0.05)


def test_a_cap_above_the_device_is_not_what_is_named() -> None:
    recipe = recipe_of(scale={"device_memory": "1TB"})
    assert "what a worker has is" in str(cap_of(Limits("cpu", 1_000_000)).refusal(recipe))


@pytest.mark.parametrize(
    ("optimizer", "each"),
    [("adamw", 4 + 4 + 8), ("adamw_8bit", 4 + 4 + 2), ("paged_adamw_8bit", 4 + 4)],
)
def test_a_smaller_slot_needs_less_by_what_its_numbers_have_on_the_device(
    optimizer: str, each: int
) -> None:
    """Weight, gradient and moments; paged moments are on the host."""
    cap, shape = cap_of(Limits("cuda", ROOM)), ModelShape.of(tiny_model().config)
    few = {"train": {"optimizer": optimizer, "batch_size": 1}}  # most is held once gradients are
    few["data"] = {"train": "rows.jsonl", "max_length": 8}
    few["scale"] = {"gradient_checkpointing": True}
    large, small = (recipe_of(method={"type": "lora", "r": r}, **few) for r in (32, 1))
    fewer = size_of(large, shape).trained - size_of(small, shape).trained
    less = cap.need([large, large]) - cap.need([large, small])
    assert less == pytest.approx(each * fewer, rel=0.02)


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes.",
    ],
)
def test_every_way_of_running_out_of_memory_is_known(words: str) -> None:
    assert exhausted_bytes(RuntimeError(words)) is not None


def test_other_errors_are_no_lack_of_memory() -> None:
    assert exhausted_bytes(RuntimeError("CUDA error: device-side assert triggered")) is None
    assert exhausted_bytes(ValueError("CUDA error: out of memory")) is None
    assert exhausted_bytes(torch.OutOfMemoryError("Tried to allocate 2.00 GiB")) is not None


def test_workers_of_a_run_fill_a_node_before_they_take_the_next() -> None:
    recipe = recipe_of(scale={"workers": 4}, train={"batch_size": 4})
    whole, half = (cap_of(Limits("cpu", ROOM, node_workers=held)) for held in (4, 2))
    assert whole.limit(recipe) == cap_of(Limits("cpu", ROOM)).limit(recipe) == ROOM // 4
    assert half.limit(recipe) == ROOM // 2
    each = cap_of(Limits("cuda", ROOM)).predict(recipe).host_bytes
    crowded = cap_of(Limits("cuda", ROOM, 3 * each, node_workers=4))
    assert "its 4 workers on a node" in str(crowded.refusal(recipe))
    assert cap_of(Limits("cuda", ROOM, 3 * each, node_workers=2)).refusal(recipe) is None


@pytest.mark.parametrize("parameters", ["none", "cpu"])
def test_what_is_offloaded_to_the_host_stays_in_the_memory_of_a_cpu(parameters: str) -> None:
    def scaled(optimizer: str, parameters: str) -> Recipe:
        offload = {"optimizer": optimizer, "parameters": parameters}
        return recipe_of(method={"type": "full"}, scale={"zero_stage": 3, "offload": offload})

    plain, offloaded = scaled("none", "none"), scaled("cpu", parameters)
    on_cpu, on_gpu = cap_of(Limits("cpu", ROOM)), cap_of(Limits("cuda", ROOM))
    assert on_cpu.predict(offloaded).device_bytes >= on_cpu.predict(plain).device_bytes
    assert on_gpu.predict(offloaded).device_bytes < on_gpu.predict(plain).device_bytes
    assert on_cpu.predict(offloaded).host_bytes == 0
    tight = cap_of(Limits("cpu", on_cpu.predict(plain).device_bytes // 2))
    assert tight.surely_exceeds(plain) == tight.surely_exceeds(offloaded)


def test_lanes_are_counted_by_the_threads_of_the_process_that_trains() -> None:
    """However many this one has: a search's driver is told to take one."""
    recipe = recipe_of(train={"batch_size": 16})
    found = {
        threads: cap_of(Limits("cpu", ROOM, threads=threads)).predict(recipe).device_bytes
        for threads in (1, 2, 4)
    }
    assert found[1] < found[2] < found[4]
    pinned = recipe_of(train={"batch_size": 16}, scale={"threads": 2})
    assert cap_of(Limits("cpu", ROOM, threads=4)).predict(pinned).device_bytes == found[2]
    assert cap_of(Limits("cpu", ROOM)).predict(pinned).device_bytes == found[2]


def test_a_refusal_says_what_the_copy_of_a_reference_costs_and_what_needs_none() -> None:
    pairs = {"type": "dpo"}
    whole = recipe_of(method={"type": "full"}, objective=pairs)
    small = Limits("cpu", 1_000_000)
    shape = ModelShape.of(tiny_model().config)
    copied = format_bytes(sum(shape.weight_bytes(whole.model)))
    words = (
        f"{copied} of it are the reference of the objective: an adapter .* and orpo no reference"
    )
    with pytest.raises(ConfigError, match=words):
        cap_of(small).require(whole)
    assert "reference" not in str(cap_of(small).refusal(recipe_of(objective=pairs)))


@pytest.mark.parametrize("count", [2, 4, 8])
def test_slots_fit_where_they_need_no_more_than_there_is(count: int) -> None:
    recipes = [recipe_of(method={"type": "lora", "r": rank}) for rank in (8, 4) * (count // 2)]
    need = cap_of(Limits("cpu", ROOM)).need(recipes)
    largest = max(cap_of(Limits("cpu", ROOM)).need([recipe]) for recipe in recipes)
    assert need < count * largest, "what fits without a base in common fits on one"
    for room, fits in ((count * largest, True), (1.01 * need, True), (0.99 * need, False)):
        assert cap_of(Limits("cpu", round(room))).fits(recipes) is fits
    _step_peaks.cache_clear()
    assert cap_of(Limits("cpu", round(count * largest))).fits(recipes, [largest] * count)
    assert _step_peaks.cache_info().misses == 0, "what is known needs no dry run"


def test_settings_that_change_no_size_need_no_prediction_of_their_own() -> None:
    cap = cap_of(Limits("cpu", ROOM))

    def predicted(alpha: float, dropout: float) -> int:
        method = {"type": "lora", "r": 24, "lora_alpha": alpha, "lora_dropout": dropout}
        return cap.predict(recipe_of(method=method)).device_bytes

    first, known = predicted(16.0, 0.1), _step_peaks.cache_info().misses
    assert predicted(64.0, 0.3) == first
    assert _step_peaks.cache_info().misses == known
    assert predicted(16.0, 0.0) < first, "without dropout nothing is masked"
