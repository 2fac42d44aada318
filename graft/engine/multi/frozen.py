"""What methods may ask of a frozen linear layer: its weight whole and unquantized."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from graft.core.errors import ModelError
from graft.models.quantized import dense_weight


def is_linear(module: nn.Module) -> bool:
    """Tells linear layers from what only has their weight: some architectures' routers."""
    if not isinstance(module, nn.Linear):
        return False
    is_plain = type(module).forward is nn.Linear.forward
    is_quantized = not type(module).__module__.startswith("transformers.models.")
    return is_plain or is_quantized or type(module).__name__ == "FalconLinear"


class FrozenLinear:
    """A linear layer of the base; see `graft.methods.layerwise.FrozenLayer`.

    Args:
        module: The layer, quantized or not.
        name: Its module path.
        folder: Of the model's files; None where the model was not loaded from files.
        moment: What `input_moment` gives.
    """

    def __init__(
        self,
        module: nn.Module,
        name: str,
        *,
        folder: Path | None = None,
        moment: torch.Tensor | None = None,
    ) -> None:
        self._module = module
        self._name = name
        self._folder = folder
        self._moment = moment
        self._squared_row_norms: torch.Tensor | None = None

    def weight(self) -> torch.Tensor:
        """The weight that the layer computes with, `[out_features, in_features]`."""
        dense = dense_weight(self._module)
        return dense.to(torch.promote_types(dense.dtype, torch.float32))

    def squared_row_norms(self) -> torch.Tensor:
        """Squared length of each row of the weight, `[out_features]`; kept once computed."""
        if self._squared_row_norms is None:
            self._squared_row_norms = self.weight().square().sum(dim=1)
        return self._squared_row_norms

    def bias(self) -> torch.Tensor | None:
        """The bias, `[out_features]`."""
        bias = self._module.bias
        return bias.detach() if isinstance(bias, torch.Tensor) else None

    def original_weight(self) -> torch.Tensor:
        """The weight before quantization, read from the model's files.

        Raises:
            ModelError: The files are not there, or hold no such weight.
        """
        from safetensors import safe_open

        key = f"{self._name}.weight"
        files = sorted(self._folder.glob("*.safetensors")) if self._folder else []
        for file in files:
            with safe_open(file, framework="pt") as opened:
                if key in set(opened.keys()):
                    weight: torch.Tensor = opened.get_tensor(key)
                    return weight.to(torch.promote_types(weight.dtype, torch.float32))
        raise ModelError(
            f"{key} is not in the safetensors files of {self._folder}; an initialisation that "
            "looks at unquantized weights needs them"
        )

    def input_moment(self) -> torch.Tensor:
        """Covariance of the inputs over training rows, `[in_features, in_features]`.

        Raises:
            ModelError: No rows were read.
        """
        if self._moment is None:
            raise ModelError(
                f"the inputs of {self._name} are not known: they are read from training rows when "
                "a training run starts, and only of linear layers; use another "
                "method.init_lora_weights, or target_modules without it"
            )
        return self._moment
