"""Loss scaling, on a CPU: slow there, but the arithmetic is the same."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from graft.engine.checkpoint import newest_checkpoint, save_checkpoint
from graft.engine.loss_scale import LossScale
from graft.engine.multi import MultiAdapterModel
from graft.engine.train import Trainer
from graft.testing import tiny_model
from tests.unit.engine.conftest import make_recipe, make_rows

ROWS = make_rows(12, lengths=(5, 12))
START = LossScale(torch.float16).state
TRAIN = {"steps": 4, "batch_size": 4, "lr": 5e-3}


def losses_of(trainer: Trainer, factor: float | None = None) -> list[float]:
    trainer.join("slot", make_recipe(method={"type": "lora", "r": 4}, train=TRAIN), ROWS)
    if factor is not None:
        trainer._loss_scale.factor = factor
    reports = [trainer.step()["slot"] for _ in range(4)]
    assert all(report.is_finite for report in reports)
    return [report.loss for report in reports]


def on(dtype: torch.dtype) -> Trainer:
    return Trainer(MultiAdapterModel(tiny_model(dtype=dtype)))


def test_an_fp16_base_learns_as_an_fp32_base_does() -> None:
    assert losses_of(on(torch.float16)) == pytest.approx(losses_of(on(torch.float32)), abs=0.02)


def test_a_step_that_overflows_is_computed_again_with_a_smaller_factor() -> None:
    trainer = on(torch.float16)
    again = losses_of(trainer, factor=2.0**24)
    assert trainer._loss_scale.factor < 2.0**24
    assert again == pytest.approx(losses_of(on(torch.float16)), abs=0.02)


def test_gradients_too_small_for_fp16_arrive() -> None:
    weight = nn.Parameter(torch.ones(1))
    scale = LossScale(torch.float16)
    scale.watch([weight])
    small = 2.0**-30
    ((weight.half() * 1.0).float() * small).sum().backward()
    assert weight.grad is not None
    assert weight.grad.item() == 0.0
    weight.grad = None
    (scale.factor * (weight.half() * 1.0).float() * small).sum().backward()
    assert weight.grad.item() == small


def test_other_precisions_are_not_scaled() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        scale = LossScale(dtype)
        weight = nn.Parameter(torch.ones(1))
        scale.watch([weight])
        assert scale.factor == 1
        assert not scale.lower()
        weight.sum().backward()
        assert weight.grad is not None
        assert weight.grad.item() == 1


def test_the_factor_grows_again_after_many_good_steps() -> None:
    scale = LossScale(torch.float16)
    start = scale.factor
    assert scale.lower()
    for _ in range(1000):
        scale.passed()
    assert scale.factor > start / 8
    while scale.lower():
        assert math.log2(scale.factor).is_integer()
    assert scale.factor == 1


@pytest.mark.parametrize("factor", [2.0**15, 2.0**24])
def test_a_slot_whose_gradient_is_broken_leaves_its_neighbour_the_factor(factor: float) -> None:
    trainer, alone = on(torch.float16), on(torch.float16)
    recipe = make_recipe(method={"type": "lora", "r": 4}, train=TRAIN)
    for name in ("broken", "whole"):
        trainer.join(name, recipe, ROWS)
    alone.join("whole", recipe, ROWS)
    for parameter in trainer.model.parameters("broken").values():
        parameter.register_hook(lambda gradient: gradient * math.nan)
    trainer._loss_scale.factor = alone._loss_scale.factor = factor
    reports = trainer.step()
    assert math.isfinite(reports["broken"].loss)
    assert not reports["broken"].is_finite
    assert reports["whole"].is_finite
    assert alone.step()["whole"].is_finite
    assert trainer._loss_scale.state == alone._loss_scale.state


def test_a_resumed_slot_goes_on_with_the_factor_of_its_checkpoint(tmp_path: Path) -> None:
    recipe = make_recipe(method={"type": "lora", "r": 4}, train=TRAIN)
    first = on(torch.float16)
    losses_of(first, factor=2.0**24)
    save_checkpoint(tmp_path, first.state("slot"), {})
    found = newest_checkpoint(tmp_path)
    assert found is not None
    second = on(torch.float16)
    second.join("slot", recipe, ROWS, state=found[0])
    assert second._loss_scale.state == first._loss_scale.state != START
    second.join("neighbour", recipe, ROWS, state=replace(found[0], loss_scale=START))
    assert second._loss_scale.state == first._loss_scale.state


def test_a_checkpoint_without_a_factor_still_loads(tmp_path: Path) -> None:
    recipe = make_recipe(method={"type": "lora", "r": 4}, train=TRAIN)
    trainer = on(torch.float32)
    losses_of(trainer)
    manifest = save_checkpoint(tmp_path, trainer.state("slot"), {}) / "manifest.json"
    content = json.loads(manifest.read_text())
    assert content.pop("loss_scale") is None
    manifest.write_text(json.dumps(content))
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found[0].loss_scale is None
    on(torch.float16).join("slot", recipe, ROWS, state=found[0])
