"""Linear heads of slots: one number from each hidden state, a value or a score."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from graft.core.errors import AdapterError
from graft.methods.base import HEAD

_MODULE = "slot_heads"
_WEIGHT = "weight"


class _Head(nn.Module):
    """One slot's head.

    The weight is its own and is used in its `forward`, so that ZeRO-3 gathers it with it.
    """

    def __init__(self, weight: torch.Tensor, *, trainable: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=trainable)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden.to(self.weight.dtype), self.weight)[..., 0]


class SlotHeads:
    """Keeps the heads of slots on a base.

    Args:
        base: The base.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        self._base = base
        self._hidden_size: int = base.config.get_text_config().hidden_size
        self._heads: dict[str, _Head] = {}

    def fresh(self) -> dict[str, torch.Tensor]:
        """A head that gives 0 for everything."""
        return {_WEIGHT: torch.zeros(1, self._hidden_size)}

    def require_fit(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Refuses a head of another shape.

        Raises:
            AdapterError: It does not fit.
        """
        shapes = {key: tuple(value.shape) for key, value in tensors.items()}
        wanted = {_WEIGHT: (1, self._hidden_size)}
        if shapes != wanted:
            raise AdapterError(
                f"the head of adapter {name!r} does not fit the base: {HEAD} should have "
                f"{wanted}, has {shapes}; a head gives one number"
            )

    def add(self, name: str, tensors: Mapping[str, torch.Tensor], *, trainable: bool) -> None:
        """Puts a slot's head on; the tensor is its own, of the right dtype and device."""
        if not self._heads:
            self._base.add_module(_MODULE, nn.ModuleDict())
        head = _Head(tensors[_WEIGHT], trainable=trainable)
        self._base.get_submodule(_MODULE).add_module(name, head)
        self._heads[name] = head

    def remove(self, name: str) -> None:
        """Takes a slot's head off, if it has one."""
        if self._heads.pop(name, None) is None:
            return
        delattr(self._base.get_submodule(_MODULE), name)
        if not self._heads:
            delattr(self._base, _MODULE)

    def __contains__(self, name: str | None) -> bool:
        return name in self._heads

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The parameter of a slot's head, `score.weight`; nothing where it has none."""
        head = self._heads.get(name)
        return {} if head is None else {f"{HEAD}.{_WEIGHT}": head.weight}

    def values(self, name: str, hidden: torch.Tensor) -> torch.Tensor:
        """Applies a slot's head to `[..., hidden]`; returns `[...]`, fp32 or fp64."""
        values: torch.Tensor = self._heads[name](hidden)
        return values
