"""A base stored in 8 or 4 bits: how it is loaded, what its layers compute, where that runs.

Every form of an adapter (packed with others, alone, evaluated, served) must meet the same base.
bitsandbytes offers faster products that would break that: its int8 product lets rows of a batch
change one another, and its 4-bit one for newer CPUs repacks the weights at the first evaluation,
with rougher constants and no gradient. Layers are set up here not to take them.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from graft.core.errors import ConfigError, MissingDependencyError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from graft.models.section import QuantizationSection

_TYPES = ("int8", "nf4")
_PROBE_FEATURES = 64


def require_kernel(section: QuantizationSection, device: torch.device, dtype: torch.dtype) -> None:
    """Tries one small layer, forward and backward, before a base is loaded.

    Raises:
        MissingDependencyError: bitsandbytes is not installed.
        ConfigError: The layer does not work on this device; what does is named.
    """
    import torch

    if section.type == "none":
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingDependencyError(
            f"model.quantization {section.type!r} needs the package bitsandbytes; install it with "
            "pip install bitsandbytes"
        )
    reason = _failure(section.type, device, dtype)
    if reason is None:
        return
    working = [
        f"model.quantization {{type: {name}}}"
        for name in _TYPES
        if name != section.type and _failure(name, device, dtype) is None
    ]
    cpu = torch.device("cpu")
    if device != cpu and _failure(section.type, cpu, dtype) is None:
        working.append("model.device: cpu")
    raise ConfigError(
        f"model.quantization {section.type!r} does not run on {device} ({reason}); use "
        + " or ".join([*working, "model.quantization {type: none}"])
    )


def _failure(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Says why a small layer of that type does not work there, or returns None."""
    import torch

    try:
        import bitsandbytes

        size = _PROBE_FEATURES
        layer = (
            bitsandbytes.nn.Linear8bitLt(size, size, bias=False, has_fp16_weights=False)
            if name == "int8"
            else bitsandbytes.nn.Linear4bit(size, size, bias=False, quant_type="nf4")
        )
        holder = torch.nn.Sequential(layer.to(dtype)).to(device).requires_grad_(False)
        prepare_layers(holder)
        x = torch.ones(2, size, dtype=dtype, device=device, requires_grad=True)
        (gradient,) = torch.autograd.grad(holder(x).sum(), x)
        return None if bool(gradient.isfinite().all()) else "it gives numbers that are not finite"
    except Exception as error:  # bitsandbytes, torch and drivers raise many kinds
        return str(error).strip().partition("\n")[0] or type(error).__name__


def quantization_config(section: QuantizationSection, dtype: torch.dtype) -> Any:
    """Returns what transformers needs to quantize while it loads."""
    from transformers import BitsAndBytesConfig

    if section.type == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=section.double,
        bnb_4bit_compute_dtype=dtype,
    )


def prepare_layers(model: nn.Module) -> None:
    """Makes quantized layers compute with their stored weights, each row for itself.

    On a CPU what is not packed is a view of the files, whose mapping would stay as long as it does:
    twice the memory that packing saves. So it is copied out of them.
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    from graft.models._int8 import Int8Linear

    for name, layer in list(model.named_modules()):
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False
        elif isinstance(layer, Linear8bitLt):
            model.set_submodule(name, Int8Linear(layer))
    for plain in (*model.parameters(), *model.buffers()):
        if plain.device.type == "cpu" and plain.is_floating_point():
            plain.data = plain.data.clone()


def dense_weight(layer: nn.Module) -> torch.Tensor:
    """Returns the weight that a linear layer computes with, `[out_features, in_features]`.

    Not to be written to: it is the layer's own where the layer is not quantized.
    """
    import torch

    weight: Any = layer.weight
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        dense: torch.Tensor = dequantize_4bit(weight.data, weight.quant_state)
        return dense
    if weight.dtype == torch.int8:
        from graft.models._int8 import dense_int8

        return dense_int8(weight.data, weight.SCB)
    whole: torch.Tensor = weight.detach()
    return whole
