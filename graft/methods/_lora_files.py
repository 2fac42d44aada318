"""PEFT's files of LoRA and DoRA: its `LoraConfig`, and tensors named `<site>.lora_A.weight`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from graft.core.errors import AdapterError
from graft.methods._lora_family import LoraFamily
from graft.methods._state import joined_state, split_state
from graft.methods.targets import ALL_LINEAR, explicit_targets, peft_layers

if TYPE_CHECKING:
    import torch

    from graft.methods.base import AdapterTensors

M = TypeVar("M", bound=LoraFamily)

_MATRICES = ("lora_A", "lora_B")
_REFUSED = (
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "fan_in_fan_out",
    "layer_replication",
    "lora_bias",
    "alora_invocation_tokens",
)
"""Fields of PEFT's config that change what a pair does."""


def lora_files(
    method: LoraFamily, tensors: AdapterTensors, base: str, *, use_dora: bool
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Returns config and state dict of an adapter without a kept first pair."""
    from peft import LoraConfig

    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
        r=method.r,
        lora_alpha=method.lora_alpha,
        lora_dropout=method.lora_dropout,
        target_modules=explicit_targets(method.target_modules, tensors),
        layers_to_transform=method.layers_to_transform and list(method.layers_to_transform),
        use_rslora=method.use_rslora,
        use_dora=use_dora,
        bias="none",
    ).to_dict()
    config = {
        key: sorted(value) if isinstance(value, set) else value for key, value in config.items()
    }
    named = {
        site: {f"{name}.weight" if name in _MATRICES else name: t for name, t in of_site.items()}
        for site, of_site in tensors.items()
    }
    return config, joined_state(named)


def read_lora_files(
    cls: type[M], config: dict[str, Any], state: dict[str, torch.Tensor]
) -> tuple[M, AdapterTensors]:
    """Reads the same back.

    Raises:
        AdapterError: A feature outside the method, unknown tensor names, or shapes unlike `r`.
    """
    for key in _REFUSED:
        if config.get(key):
            raise AdapterError(
                f"adapter_config.json: {key}={config[key]!r} is not plain LoRA; "
                "re-export the adapter with one rank for all layers and without it"
            )
    named = {key.removesuffix(".weight"): tensor for key, tensor in state.items()}
    if len(named) < len(state):
        raise AdapterError("adapter_model.safetensors: names one tensor with and without weight")
    tensors = split_state(named, cls.peft_names, cls.model_fields["type"].default)
    targets = config.get("target_modules") or ()
    if targets == ALL_LINEAR:
        targets = explicit_targets(targets, tensors)
    elif isinstance(targets, str):  # a pattern is not run: the tensors say which layers it meant
        targets = sorted(tensors)
    method = cls.model_validate(
        {
            "r": config.get("r"),
            "lora_alpha": config.get("lora_alpha"),
            "lora_dropout": config.get("lora_dropout", 0.0),
            "use_rslora": config.get("use_rslora", False),
            "layers_to_transform": peft_layers(config.get("layers_to_transform")),
            "target_modules": list(targets),
        }
    )
    for site, of_site in tensors.items():
        shapes = [tuple(of_site[name].shape) for name in _MATRICES]
        if shapes[0][:1] != (method.r,) or shapes[1][1:] != (method.r,):
            raise AdapterError(
                f"adapter_config.json says r={method.r} but the matrices of {site} are "
                f"{shapes[0]} and {shapes[1]}"
            )
    return method, tensors
