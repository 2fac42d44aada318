"""An fp64 model whose arithmetic stays in fp64, recipes and rows for it."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from graft.data.records import TokenRow
from graft.recipe.sections import Recipe
from graft.testing import tiny_model


@pytest.fixture
def threads() -> Any:
    """Sets torch's threads and puts them back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def exact_model(seed: int = 0) -> LlamaForCausalLM:
    """A tiny fp64 Llama."""
    model = tiny_model(seed=seed, dtype=torch.float64)
    keep_exact(model)
    return model


def keep_exact(model: LlamaForCausalLM) -> None:
    """Replaces transformers' own RMSNorm of an fp64 model, which rounds to fp32 inside."""
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            norm = torch.nn.RMSNorm(module.weight.shape[0], eps=module.variance_epsilon)
            norm.weight = torch.nn.Parameter(module.weight.detach().double(), requires_grad=False)
            model.set_submodule(name, norm)


def make_recipe(**sections: Any) -> Recipe:
    """A recipe of defaults with some sections given."""
    base: dict[str, Any] = {"model": {"source": "tiny"}, "data": {"train": "rows.jsonl"}}
    return Recipe.model_validate({**base, **sections})


def make_rows(num_rows: int, *, lengths: tuple[int, int], seed: int = 0) -> list[TokenRow]:
    """Random token rows whose second half is supervised."""
    generator = random.Random(seed)
    rows = []
    for i in range(num_rows):
        length = generator.randint(*lengths)
        ids = [generator.randrange(4, 384) for _ in range(length)]
        rows.append(TokenRow(ids, [t >= length // 2 for t in range(length)], f"rows:{i}"))
    return rows


@pytest.fixture
def exact() -> LlamaForCausalLM:
    """The fp64 model."""
    return exact_model()
