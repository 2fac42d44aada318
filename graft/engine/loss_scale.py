"""Loss scaling: small gradients of an fp16 base would be rounded to 0 on their way down."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

_LARGEST = 2.0**24
_STEPS_TO_GROW = 200


class LossScaleState(NamedTuple):
    """What a loss scale has learned."""

    factor: float
    good_steps: int
    """In a row, without an overflow."""


class LossScale:
    """A power of two that the loss is multiplied with before the backward pass.

    The parameters' own gradients are fp32 and are divided by it as they arrive, so optimizers,
    clipping and ZeRO never meet it. Where a gradient overflows on its way, the step is computed
    again with a smaller factor; dropout is a function of seed and step, so nothing is lost. A
    power of two changes no digit of what neither overflows nor underflows.

    Reference:
        Micikevicius et al., Mixed Precision Training, arXiv 1710.03740.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.is_on = dtype == torch.float16
        self.factor = 2.0**15 if self.is_on else 1.0
        self._good_steps = 0

    @property
    def state(self) -> LossScaleState:
        """Where it stands."""
        return LossScaleState(self.factor, self._good_steps)

    def restore(self, state: LossScaleState) -> None:
        """Goes back to where it stood."""
        self.factor, self._good_steps = state

    def watch(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Divides what arrives at parameters that train."""
        for parameter in parameters if self.is_on else ():
            if parameter.requires_grad:
                parameter.register_hook(lambda gradient: gradient / self.factor)

    def lower(self) -> bool:
        """Makes the factor smaller after an overflow; says whether that was possible."""
        self._good_steps = 0
        is_possible = self.factor > 1
        self.factor = max(1.0, self.factor / 8)
        return is_possible

    def passed(self) -> None:
        """Counts a step; after many without overflow the factor grows again."""
        self._good_steps += 1
        if self.is_on and self._good_steps % _STEPS_TO_GROW == 0:
            self.factor = min(_LARGEST, self.factor * 2)
