"""Loading a ready base model: frozen, in the asked precision, on the asked device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from graft.core.errors import ConfigError, ModelError
from graft.models._quiet import no_foreign_bars
from graft.models.head import require_known_head
from graft.models.quantized import prepare_layers, quantization_config, require_kernel

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from graft.models.ready import ReadyModel
    from graft.models.section import ModelSection


def pick_device(section: ModelSection) -> torch.device:
    """Returns the device that `model.device` means on this machine.

    Raises:
        ConfigError: A GPU is asked for and there is none.
    """
    import torch

    is_there = torch.cuda.is_available()
    if section.device == "cuda" and not is_there:
        raise ConfigError(
            "model.device is 'cuda' and torch sees no GPU here; use 'auto' or 'cpu', or install a "
            "torch built for this GPU"
        )
    return torch.device("cuda" if is_there and section.device != "cpu" else "cpu")


def torch_dtype(section: ModelSection) -> torch.dtype:
    """Returns the precision of the weights that are not quantized."""
    import torch

    known = {
        "bf16": torch.bfloat16,
        "fp16": torch.float16,
        "fp32": torch.float32,
        "fp64": torch.float64,
    }
    return known[section.dtype]


def require_device(section: ModelSection) -> torch.device:
    """Returns the device that the base will be on, having tried there what its storage needs.

    To be asked in the process that will load the base, before anything is fetched for it.

    Raises:
        ConfigError: A GPU is asked for and there is none, or quantized layers do not run there.
        MissingDependencyError: Quantization is asked for without bitsandbytes.
    """
    device = pick_device(section)
    require_kernel(section.quantization, device, torch_dtype(section))
    return device


def load_model(ready: ReadyModel, section: ModelSection) -> PreTrainedModel:
    """Loads the base in eval mode with no weight that asks for a gradient.

    Code that comes with a model is never run; weights come from safetensors only.

    Raises:
        ModelError: The weights do not fit the configuration, or the architecture is unknown, or
            makes its logits in an unknown way.
        ConfigError: Device and settings do not go together.
        MissingDependencyError: Quantization is asked for without bitsandbytes.
    """
    from transformers import AutoModelForCausalLM

    device = require_device(section)
    dtype = torch_dtype(section)
    options: dict[str, Any] = {}
    if section.quantization.type != "none":
        options["quantization_config"] = quantization_config(section.quantization, dtype)
        options["device_map"] = {"": device}
    try:
        with no_foreign_bars():
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                ready.path,
                dtype=dtype,
                attn_implementation=section.attention,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                **options,
            )
    except Exception as error:  # transformers raises many kinds for one cause
        raise ModelError(
            f"the base model in {ready.path} cannot be loaded ({type(error).__name__}: {error})"
        ) from error
    if options:
        prepare_layers(model)
    else:
        model.to(device)
    model.requires_grad_(False)
    require_known_head(model.eval())
    return model
