"""What a method of PEFT adds to a base, counted on layers without storage, and what stands for it.

PEFT's modules are put on a base of shapes alone. Their own code does not run in a dry run (it moves
modules, which tensors without storage refuse), so LoRA at every linear layer stands there in its
place: beside the base's own activations either keeps little.
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch

from graft.core.errors import ConfigError
from graft.methods.lora import LoraMethod

if TYPE_CHECKING:
    from collections.abc import Iterable

    from graft.engine.memory.shape import ModelShape
    from graft.methods.peft import PeftMethod

STAND_IN = LoraMethod(r=8)


class PeftSize(NamedTuple):
    """Numbers of the modules that PEFT puts on."""

    trained: int
    frozen: int
    """Beside the base's own: random projections."""
    largest: int
    """Of the largest trained tensor."""


@lru_cache(maxsize=64)
def peft_size(shape: ModelShape, method: PeftMethod) -> PeftSize | None:
    """Counts what PEFT puts on a base; None where its code needs weights with values."""
    with torch.device("meta"):
        base = shape.build("eager", torch.float32)
        base.requires_grad_(False)
        before = _count(itertools.chain(base.parameters(), base.buffers()))
        try:
            model = method.inject(base, seed=0)
        except ConfigError:  # where the method does not fit either, attaching it says so
            return None
    after = _count(itertools.chain(model.parameters(), model.buffers()))
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    return PeftSize(sum(trained), max(0, after - before - sum(trained)), max(trained, default=0))


def _count(tensors: Iterable[torch.Tensor]) -> int:
    return sum({id(tensor): tensor.numel() for tensor in tensors}.values())
