"""Steps on tensors without storage against the same steps on real ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from graft.engine.logprobs import read_positions
from graft.engine.memory import ModelShape, Workload, dry_run
from graft.engine.memory.dry_run import Setting, step_peaks
from graft.engine.memory.ledger import Ledger
from graft.engine.multi import MultiAdapterModel
from graft.engine.recompute import recompute_layers
from graft.methods.base import METHODS
from graft.models.section import ModelSection, QuantizationSection
from graft.testing import tiny_model

WORK = Workload(rows=3, row_tokens=20, supervised_tokens=30)


def setting_of(method: str, **settings: Any) -> Setting:
    section = ModelSection(source="", dtype=settings.pop("dtype", "fp32"))
    return Setting(section, METHODS.build({"type": method}), "cpu", **settings)


def deep_model(num_layers: int = 5) -> LlamaForCausalLM:
    return tiny_model(num_layers=num_layers)


def highest(peaks: list[Any]) -> int:
    return max(peak.total() for peak in peaks)


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "bottleneck", "prefix", "prompt"])
def test_a_dry_run_counts_what_a_real_step_allocates(method: str, checkpoints: bool) -> None:
    base = deep_model()
    setting = setting_of(method, checkpoints=checkpoints)
    model = MultiAdapterModel(base)
    if checkpoints:
        recompute_layers(model)
    model.add_slot("slot0", setting.method, trainable=True)
    batch = dry_run._micro_batch(WORK, ["slot0"])
    assert batch.attention_mask is not None
    batch.attention_mask[0, -1] = 0  # transformers needs no mask where nothing is padded
    ledger = Ledger({})
    with ledger:
        positions = read_positions(model, batch, dry_run._stream)
        positions.logprobs_P.sum().backward()
    (real,) = ledger.peaks.values()
    found = highest(step_peaks(ModelShape.of(base.config), setting, WORK))
    # A fake mask cannot be looked at, so transformers makes a few positions more.
    assert found == pytest.approx(real.total(), rel=1e-3)


def test_what_the_ledger_has_after_the_forward_pass_is_what_autograd_keeps() -> None:
    model = MultiAdapterModel(deep_model())
    model.add_slot("slot0", METHODS.build({"type": "lora"}), trainable=True)
    own = {p.untyped_storage()._cdata for p in model.base.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    ledger = Ledger({})
    with ledger, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        batch = dry_run._micro_batch(WORK, ["slot0"])
        positions = read_positions(model, batch, dry_run._stream)
        del batch
    results = positions.logprobs_P.nbytes + positions.hidden_PH.nbytes
    live = sum(size for _, size, _ in ledger._alive.values())
    assert sum(kept.values()) <= live <= sum(kept.values()) + results + 8 * WORK.tokens


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("method", ["lora", "dora", "full", "prefix"])
def test_two_short_stacks_tell_what_the_whole_one_takes(method: str, checkpoints: bool) -> None:
    shape = ModelShape.of(deep_model(7).config)
    setting = setting_of(method, checkpoints=checkpoints)
    whole = dry_run._step(shape, setting, WORK, None)
    assert highest(step_peaks(shape, setting, WORK)) == highest(list(whole.values()))


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_a_quantized_base_keeps_no_unpacked_weight(quantization: str) -> None:
    shape = ModelShape.of(deep_model().config)
    packed = setting_of("lora")._replace(
        section=ModelSection(source="", quantization=QuantizationSection(type=quantization))
    )
    plain = setting_of("lora", dtype="bf16")
    extra = highest(step_peaks(shape, packed, WORK)) - highest(step_peaks(shape, plain, WORK))
    one_weight = 2 * max(a * b for a, b in shape.linears.values())
    assert abs(extra) <= one_weight < 2 * sum(a * b for a, b in shape.linears.values()) / 10


def test_recomputed_layers_keep_little_and_more_tokens_take_more() -> None:
    shape = ModelShape.of(deep_model().config)
    kept = highest(step_peaks(shape, setting_of("lora"), WORK))
    again = highest(step_peaks(shape, setting_of("lora", checkpoints=True), WORK))
    longer = highest(step_peaks(shape, setting_of("lora"), WORK._replace(row_tokens=40)))
    assert again < kept < longer


def test_a_gpu_has_kernels_that_keep_no_matrix_of_attention() -> None:
    shape = ModelShape.of(deep_model().config)
    setting = setting_of("lora", dtype="bf16")
    long = Workload(rows=1, row_tokens=250, supervised_tokens=1, is_padded=False)
    on_cpu = highest(step_peaks(shape, setting, long))
    on_gpu = highest(step_peaks(shape, setting._replace(device="cuda"), long))
    assert on_gpu < on_cpu
