"""Methods that PEFT has not, as anybody would write them: a module around a linear layer.

Each follows its paper's formula without a thought of other adapters or of rows that have none.
Parameters train in fp32 and are computed with in the layer's own precision, which is the quickest
of what one would write.

Shapes: N rows, T tokens, I in_features, O out_features, K experts, M experts of a memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from graft.methods.bottleneck import BottleneckMethod
from graft.methods.memory import MemoryMethod
from graft.methods.mixture import MixtureMethod

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from graft.methods.base import Method


class AdaptedLinear(nn.Module):
    """A frozen linear layer and what a method adds to its output."""

    def __init__(self, layer: nn.Module, method: Method, tensors: Mapping[str, torch.Tensor]):
        super().__init__()
        self.layer, self._method = layer, method
        self.own = nn.ParameterDict(
            {
                name: nn.Parameter(t, requires_grad=name not in method.frozen)
                for name, t in tensors.items()
            }
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the layer's output, changed."""
        own = {name: parameter.to(x.dtype) for name, parameter in self.own.items()}
        out: torch.Tensor = self.layer(x)
        return out + added(self._method, own, x, out)


def put_on(
    base: PreTrainedModel, method: Method, tensors: Mapping[str, Mapping[str, torch.Tensor]]
) -> PreTrainedModel:
    """Wraps the layers that have tensors, in place."""
    for site, of_site in tensors.items():
        base.set_submodule(site, AdaptedLinear(base.get_submodule(site), method, of_site))
    return base


def added(
    method: Method, own: Mapping[str, torch.Tensor], x_NTI: torch.Tensor, out_NTO: torch.Tensor
) -> torch.Tensor:
    """What a method adds to a layer's output.

    Raises:
        TypeError: PEFT has that method.
    """
    if isinstance(method, BottleneckMethod):
        return _bottleneck(method, own, out_NTO)
    if isinstance(method, MixtureMethod):
        return _mixture(method, own, x_NTI)
    if isinstance(method, MemoryMethod):
        return _memory(method, own, x_NTI)
    raise TypeError(f"{method.type} is to be raced against PEFT's")


def _bottleneck(
    method: BottleneckMethod, own: Mapping[str, torch.Tensor], out_NTO: torch.Tensor
) -> torch.Tensor:
    act = getattr(functional, method.activation)
    hidden = act(functional.linear(out_NTO, own["down_weight"], own["down_bias"]))
    return functional.linear(hidden, own["up_weight"], own["up_bias"])


def _mixture(
    method: MixtureMethod, own: Mapping[str, torch.Tensor], x_NTI: torch.Tensor
) -> torch.Tensor:
    logits_NTK = functional.linear(x_NTI, own["gate_weight"], own["gate_bias"])
    gate_NTK = logits_NTK.softmax(dim=-1, dtype=torch.float32).to(x_NTI.dtype)
    low = functional.linear(x_NTI, own["experts_A"]).unflatten(-1, (method.num_experts, method.r))
    gated = (low * gate_NTK[..., None]).flatten(-2)
    return functional.linear(gated, own["experts_B"]) * (method.lora_alpha / method.r)


def _memory(
    method: MemoryMethod, own: Mapping[str, torch.Tensor], x_NTI: torch.Tensor
) -> torch.Tensor:
    """All memories with those not picked at zero: quicker than gathering each token's own."""
    cosines_NTM = functional.linear(x_NTI, own["memory_keys"]).float()
    cosines_NTM = cosines_NTM / x_NTI.float().norm(dim=-1, keepdim=True)
    scores, index = (cosines_NTM * math.sqrt(x_NTI.shape[-1])).topk(method.top_k, dim=-1)
    weight_NTM = torch.zeros_like(cosines_NTM).scatter(-1, index, scores.softmax(dim=-1))
    low = functional.linear(x_NTI, own["memory_A"])
    opened = low * weight_NTM.to(low.dtype).repeat_interleave(method.r, dim=-1)
    return functional.linear(opened, own["memory_B"]) * (method.lora_alpha / method.r)
