"""A base without storage, and what kernels take that no tensor shows.

Shapes: O out_features, I in_features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from graft.engine.memory.ledger import Scratch
from graft.engine.multi.attention import keep_attention_kernel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from graft.models.section import QuantizationSection

DeviceType = Literal["cpu", "cuda"]

_CUSTOM_4BIT_ROWS = 1536
"""Rows up to which bitsandbytes multiplies 4-bit weights on CUDA without unpacking them."""


# Kernels are imported where layers are made and not in the account of a step: an import that logs
# an error lets the record hold the frames of that moment, and with them all tensors of the step.


class _Nf4Linear(nn.Linear):
    """bitsandbytes' 4-bit product on weights that nobody packed."""

    def __init__(self, layer: nn.Linear, quantization: QuantizationSection) -> None:
        from bitsandbytes.autograd._functions import MatMul4Bit

        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.bias = layer.bias
        count = layer.weight.numel()
        packed = torch.empty(math.ceil(count / 2), 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.weight.quant_state = _quant_state(layer.weight, quantization)  # type: ignore[attr-defined]
        self._product = MatMul4Bit.apply

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = self.weight.quant_state  # type: ignore[attr-defined]
        product: torch.Tensor = self._product(x, self.weight, None, self.bias, state)
        return product


def _quant_state(weight: torch.Tensor, quantization: QuantizationSection) -> Any:
    from bitsandbytes.functional import QuantState

    blocks = math.ceil(weight.numel() / 64)
    of_weight = {
        "shape": weight.shape,
        "dtype": weight.dtype,
        "blocksize": 64,
        "code": torch.empty(16),
        "quant_type": "nf4",
    }
    if not quantization.double:
        return QuantState(absmax=torch.empty(blocks), **of_weight)
    of_constants = QuantState(
        absmax=torch.empty(math.ceil(blocks / 256)),
        code=torch.empty(256),
        blocksize=256,
        dtype=torch.float32,
    )
    return QuantState(
        absmax=torch.empty(blocks, dtype=torch.uint8),
        offset=torch.empty(()),
        state2=of_constants,
        **of_weight,
    )


class _Int8Linear(nn.Linear):
    """Our product on 8-bit weights that nobody rounded."""

    def __init__(self, layer: nn.Linear) -> None:
        from graft.models._int8 import Int8Linear

        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.bias = layer.bias
        packed = torch.empty(layer.weight.shape, dtype=torch.int8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.weight.SCB = torch.empty(layer.out_features)  # type: ignore[attr-defined]
        self._forward: Callable[..., torch.Tensor] = Int8Linear.forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._forward(self, x)


def pack_layers(base: PreTrainedModel, quantization: QuantizationSection) -> None:
    """Replaces linear layers by quantized ones, as loading the base would; the head stays."""
    head = base.get_output_embeddings()
    for name, layer in list(base.named_modules()):
        if isinstance(layer, nn.Linear) and layer is not head:
            is_int8 = quantization.type == "int8"
            packed = _Int8Linear(layer) if is_int8 else _Nf4Linear(layer, quantization)
            base.set_submodule(name, packed)


def _gemm_4bit(device: DeviceType) -> Scratch:
    def unpacked(args: tuple[Any, ...], _: Any) -> int:
        x, weight, (rows, columns), absmax = args[:4]
        if device == "cuda" and x.numel() // x.shape[-1] <= _CUSTOM_4BIT_ROWS:
            return 0
        constants = 8 * absmax.numel() * 256 if absmax.numel() < weight.numel() // 32 else 0
        return int(rows * columns * x.dtype.itemsize + constants)

    return unpacked


def scratch_of_kernels(device: DeviceType) -> dict[str, Scratch]:
    """Returns what kernels take for themselves, by name.

    bitsandbytes unpacks a 4-bit weight inside its product (with its constants, in fp32).
    """
    return {"bitsandbytes::gemm_4bit": _gemm_4bit(device)}


def kernels_of(device: DeviceType) -> AbstractContextManager[None]:
    """Lets attention run by the kernels of a device.

    The fused kernel of a CPU keeps for the backward pass what flash attention and the
    memory-efficient kernel of CUDA keep: queries, keys, values, the output, a number a row and the
    mask. A GPU takes one of those for rows of any length.
    """
    return nullcontext() if device == "cpu" else keep_attention_kernel()
