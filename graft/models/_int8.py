"""The linear layer of an int8 base: weights in 8 bits, arithmetic in the base's own dtype."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.nn import Linear8bitLt
from torch.nn import functional


def dense_int8(
    weight: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Returns `[out_features, in_features]` weights; `absmax` is of each output row."""
    return weight.to(dtype).mul_((absmax / 127.0)[:, None])


class _Product(torch.autograd.Function):
    """A linear layer that unpacks its weight again for the backward pass instead of keeping it.

    It keeps the parameter, not its data, which ZeRO-3 takes away and brings back.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        absmax: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(weight, absmax)
        return functional.linear(x, dense_int8(weight, absmax, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, absmax = ctx.saved_tensors
        (grad,) = grads
        return grad @ dense_int8(weight, absmax, grad.dtype), None, None, None


class Int8Linear(Linear8bitLt):
    """Takes over a quantized layer and multiplies with its weights as they are.

    bitsandbytes' own product rounds the inputs to int8 too, and leaves out whole input features
    where any row of the batch has an outlier: rows would change one another's result.
    """

    def __init__(self, layer: Linear8bitLt) -> None:
        super().__init__(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            has_fp16_weights=False,
            device="meta",
        )
        self.weight = layer.weight
        self.bias = layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns `x Wᵀ + b`, `[..., out_features]`."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        product: torch.Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            x, self.weight, self.weight.SCB, bias
        )
        return product
