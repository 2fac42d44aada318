"""A reward model's head in adapter files, where PEFT keeps that of a sequence classifier."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from graft.core.errors import AdapterError
from graft.methods.base import HEAD, Method
from graft.methods.virtual import VirtualMethod

if TYPE_CHECKING:
    import torch

_WEIGHT = "weight"
_NAME = f"{HEAD}.{_WEIGHT}"
_TASK = "SEQ_CLS"
_CLASSIFIERS = frozenset({"classifier", HEAD})
"""Modules that PEFT itself lists for every sequence classifier."""


def add_head(
    method: Method,
    config: dict[str, Any],
    state: dict[str, torch.Tensor],
    head: dict[str, torch.Tensor] | None,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Returns a method's files with the head in them."""
    if head is None:
        return config, state
    if method.artifact_kind == "full":
        name = _NAME
    elif isinstance(method, VirtualMethod):
        name = f"base_model.{_NAME}"
    else:
        name = f"base_model.model.{_NAME}"
    config = {**config, "task_type": _TASK, "modules_to_save": [HEAD]}
    return config, {**state, name: head[_WEIGHT]}


def take_head(
    config: dict[str, Any], state: dict[str, torch.Tensor]
) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, torch.Tensor] | None]:
    """Returns a method's files without the head, and the head; the inverse of `add_head`.

    Raises:
        AdapterError: The files say that there is one and have none, or it gives several numbers.
    """
    if config.get("task_type") != _TASK:
        return config, state, None
    names = [name for name in state if name == _NAME or name.endswith(f".{_NAME}")]
    if len(names) != 1:
        raise AdapterError(
            f"the adapter's task_type is {_TASK}, and of its tensors {len(names)} are a {_NAME}; "
            "a sequence classifier has one"
        )
    state = dict(state)
    weight = state.pop(names[0])
    if weight.ndim != 2 or weight.shape[0] != 1:
        raise AdapterError(
            f"{names[0]} has shape {tuple(weight.shape)}: a reward model gives one number, "
            "[1, hidden]; train it with one output (num_labels=1)"
        )
    config = dict(config)
    modules = config.get("modules_to_save")
    if isinstance(modules, list) and set(modules) <= _CLASSIFIERS:
        del config["modules_to_save"]
    return config, state, {_WEIGHT: weight}
