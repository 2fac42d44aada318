"""bitsandbytes' optimizers behind ours; what of them runs on a CPU is compared here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.optim import Optimizer

from graft.core.errors import ConfigError
from graft.engine.backends.optimizers import make_optimizer, read_moments, write_moments
from graft.engine.trainable import require_trainable
from graft.recipe.sections import Recipe, TrainSection
from tests.unit.engine.conftest import make_recipe

NAMES = ("adamw_8bit", "paged_adamw", "paged_adamw_8bit")
SHAPE = (64, 80)
"""Enough numbers for bitsandbytes to keep moments in 8 bits, and no multiple of its blocks."""


def stepped(
    name: str, steps: int, start: dict[str, torch.Tensor] | None = None
) -> tuple[nn.Parameter, Optimizer]:
    generator = torch.Generator().manual_seed(1)
    weight = nn.Parameter(torch.randn(SHAPE, generator=generator))
    settings = TrainSection(optimizer=name, lr=1e-2, weight_decay=0.1)  # type: ignore[arg-type]
    optimizer = make_optimizer(settings, [{"params": [weight]}])
    if start is not None:
        write_moments(optimizer, weight, start)
    for _ in range(steps):
        weight.grad = torch.randn(SHAPE, generator=generator)
        optimizer.step()
    return weight, optimizer


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_paged_adamw_is_adamw() -> None:
    expected, theirs = stepped("adamw", 5)
    weight, ours = stepped("paged_adamw", 5)
    torch.testing.assert_close(weight, expected, atol=1e-6, rtol=1e-5)
    kept, wanted = read_moments(ours, weight), read_moments(theirs, expected)
    assert kept.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(kept[name], value)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_moments_of_adamw_are_taken_over_within_the_digits_that_are_kept(name: str) -> None:
    weight, optimizer = stepped("adamw", 3)
    moments = read_moments(optimizer, weight)
    other_weight, other = stepped(name, 0, moments)
    kept = read_moments(other, other_weight)
    assert kept["step"] == moments["step"] == 3
    for key in ("exp_avg", "exp_avg_sq"):
        largest = moments[key].abs().max()
        tolerance = 0.0 if name == "paged_adamw" else 0.02
        assert (kept[key] - moments[key]).abs().max() <= tolerance * largest


def test_a_parameter_that_was_never_stepped_has_no_moments() -> None:
    weight, optimizer = stepped("adamw", 0)
    assert read_moments(optimizer, weight) == {}


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"train": {"optimizer": "adamw_8bit"}}, "adamw_8bit trains on a GPU only: bitsandbytes"),
        ({"model": {"source": "tiny", "dtype": "fp16"}}, "fp16 trains on a GPU only: its small"),
    ],
)
def test_what_needs_a_gpu_is_refused_on_a_cpu_in_words(
    sections: dict[str, Any], words: str
) -> None:
    recipe = make_recipe(**sections)
    with pytest.raises(ConfigError, match=words):
        require_trainable(recipe, torch.device("cpu"))
    content = recipe.model_dump(mode="json")
    content["model"]["device"] = "cpu"
    with pytest.raises(ValidationError, match=words):
        Recipe.model_validate(content)


@pytest.mark.parametrize("name", NAMES)
def test_moments_in_blocks_or_pages_are_not_divided_by_zero_stages(name: str) -> None:
    with pytest.raises(ValidationError, match=f"{name} needs scale.zero_stage 0: ZeRO cuts"):
        make_recipe(train={"optimizer": name}, scale={"zero_stage": 2})
