"""No gradient goes below the lowest layer that a pack adapts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graft.engine.multi import MultiAdapterModel
from graft.engine.recompute import recompute_layers
from graft.engine.train import Trainer
from graft.testing import tiny_model
from tests.unit.engine.conftest import make_recipe, make_rows

LAYERS = 4
ROWS = make_rows(8, lengths=(5, 40))
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"type": "lora", "r": 2, "lora_dropout": 0.1},
    "dora": {"type": "dora", "r": 2},
    "mixture": {"type": "mixture", "r": 2, "num_experts": 2},
}


class Seen:
    """What the decoder layers of a base went through."""

    def __init__(self, model: MultiAdapterModel) -> None:
        self.recorded = [False] * LAYERS
        """Whether a layer's output asked for a gradient."""
        self.reached = [False] * LAYERS
        """Whether the backward pass came to a layer's output."""
        self.runs = [0] * LAYERS
        for at, layer in enumerate(model.base.get_decoder().layers):
            layer.self_attn.register_forward_hook(lambda *_, at=at: self._ran(at))
            layer.register_forward_hook(lambda _, __, out, at=at: self._saw(at, out))

    def _ran(self, at: int) -> None:
        self.runs[at] += 1

    def _saw(self, at: int, out: torch.Tensor) -> None:
        self.recorded[at] |= out.requires_grad
        if out.requires_grad:
            out.register_hook(lambda _: self._came(at))

    def _came(self, at: int) -> None:
        self.reached[at] = True


def step(
    lowest: dict[str, int], threads: int, *, recompute: bool = False, keeps: bool = False
) -> tuple[Seen, Trainer]:
    """Steps a pack once, in which each slot adapts a layer and those above it."""
    torch.set_num_threads(threads)
    model = MultiAdapterModel(tiny_model(num_layers=LAYERS))
    if recompute:
        recompute_layers(model)
    seen = Seen(model)
    trainer = Trainer(model, keeps_lower_states=keeps)
    for method, first in lowest.items():
        targets = [f"layers.{at}.self_attn.v_proj" for at in range(first, LAYERS)]
        recipe = make_recipe(
            method={**METHODS[method], "target_modules": targets},
            train={"steps": 2, "batch_size": 6, "lr": 1e-3},
        )
        trainer.join(method, recipe, ROWS)
    reports = trainer.step()
    assert all(report.grad_norm > 0 for report in reports.values())
    return seen, trainer


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("lowest", [LAYERS - 1, 2, 0])
def test_layers_below_the_lowest_adapted_one_record_nothing(
    threads: Any, lowest: int, lanes: int, recompute: bool
) -> None:
    pack = {"lora": lowest, "dora": LAYERS - 1, "mixture": LAYERS - 1}
    seen, _ = step(pack, lanes, recompute=recompute)
    is_adapted = [at >= lowest for at in range(LAYERS)]
    assert seen.recorded == is_adapted
    assert seen.reached == is_adapted
    passes = seen.runs[0] if lowest else seen.runs[0] // (1 + recompute)
    again = [passes * (2 if recompute and at else 1) for at in is_adapted]
    assert seen.runs == again, "a layer below is computed once, a recomputed one twice"


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("lanes", [1, 2])
def test_nothing_is_recorded_there_where_their_states_are_kept(
    threads: Any, lanes: int, recompute: bool
) -> None:
    seen, trainer = step({"lora": 2, "dora": 3}, lanes, recompute=recompute, keeps=True)
    assert trainer.model.lower.num_bytes > 0
    assert seen.recorded == seen.reached == [False, False, True, True]


def test_what_a_pack_records_ends_where_its_lowest_slot_has_left(threads: Any) -> None:
    seen, trainer = step({"lora": 1, "dora": 3}, 1)
    assert seen.reached == [False, True, True, True]
    trainer.leave("lora")
    seen.recorded, seen.reached = [False] * LAYERS, [False] * LAYERS
    assert trainer.step()["dora"].grad_norm > 0
    assert seen.reached == seen.recorded == [False, False, False, True]
