"""LoRA on fused experts in PEFT's files: one pair of tensors for all experts of a layer.

PEFT names the parameter (`target_parameters: [mlp.experts.down_proj]`) and stores A of all experts
as `[experts * r, in]`, B as `[out, r * experts]`, the expert counting fastest. Where both
projections are adapted, the first one's tensors stand below `base_layer`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from graft.core.errors import AdapterError

if TYPE_CHECKING:
    import torch

    State = dict[str, torch.Tensor]

_PREFIX = "base_model.model."
_PROJECTIONS = ("gate_up_proj", "down_proj")
"""In the order in which the module holds them, which is PEFT's."""
_OF_EXPERT = re.compile(
    rf"{re.escape(_PREFIX)}(?P<path>.+)\.(?P<expert>\d+)\.(?P<projection>gate_up_proj|down_proj)"
    r"\.(?P<pair>lora_[AB])\.weight"
)
_FUSED = re.compile(
    rf"{re.escape(_PREFIX)}(?P<path>.+?)(?P<depth>(\.base_layer)*)\.(?P<pair>lora_[AB])\.weight"
)

_ONE_EXPERT = re.compile(rf"\.\d+\.({'|'.join(_PROJECTIONS)})$")


def join_experts(config: dict[str, Any], state: State) -> tuple[dict[str, Any], State]:
    """Puts the pairs of single experts together where those of all are there; else changes nothing.

    PEFT cannot say that a single expert is adapted: such an adapter keeps names of our own.

    Args:
        config: PEFT's, with targets by path ending.
        state: With a pair for each `<path>.experts.<number>.<projection>`.
    """
    import torch

    found: dict[tuple[str, str, str], dict[int, torch.Tensor]] = {}
    plain: State = {}
    for key, tensor in state.items():
        if (match := _OF_EXPERT.fullmatch(key)) is None:
            plain[key] = tensor
        else:
            name = (match["path"], match["projection"], match["pair"])
            found.setdefault(name, {})[int(match["expert"])] = tensor
    adapted = {(path, projection) for path, projection, _ in found}
    targets = {
        target
        for target in config["target_modules"]
        for path, projection in adapted
        if _is_named(path, projection, [target])
    }
    is_whole = not any(_ONE_EXPERT.search(target) for target in config["target_modules"])
    if not found or not is_whole:
        return config, state
    for (path, projection, pair), by_expert in found.items():
        tensors = [by_expert[expert] for expert in sorted(by_expert)]
        is_inner = projection == _PROJECTIONS[0] and (path, _PROJECTIONS[1]) in adapted
        where = f"{path}.base_layer" if is_inner else path
        plain[f"{_PREFIX}{where}.{pair}.weight"] = (
            torch.cat(tensors) if pair == "lora_A" else torch.stack(tensors, dim=-1).flatten(1)
        )
    named = {
        "target_modules": [t for t in config["target_modules"] if t not in targets],
        "target_parameters": sorted(f"{path}.{projection}" for path, projection in adapted),
    }
    return {**config, **named}, plain


def split_experts(config: dict[str, Any], state: State) -> tuple[dict[str, Any], State]:
    """Takes the tensors of fused experts apart again; a file without them is returned as it is.

    Args:
        config: Hostile.
        state: Hostile.

    Raises:
        AdapterError: `target_parameters` is no list of names, or tensors do not fit `r`.
    """
    parameters = config.get("target_parameters")
    if not parameters:
        return config, state
    r = config.get("r")
    if not isinstance(parameters, list) or not all(isinstance(p, str) for p in parameters):
        raise AdapterError("adapter_config.json: target_parameters must be a list of names")
    if type(r) is not int or r < 1:
        raise AdapterError(f"adapter_config.json: r={r!r} must be a whole number above 0")
    split: State = {}
    for key, tensor in state.items():
        match = _FUSED.fullmatch(key)
        path = match["path"] if match else ""
        here = [p for p in _PROJECTIONS if _is_named(path, p, parameters)]
        if match is None or not here:
            split[key] = tensor
            continue
        depth = match["depth"].count(".")
        if depth >= len(here):
            raise AdapterError(
                f"adapter_model.safetensors: {key!r} is of a parameter that target_parameters "
                "does not name"
            )
        stem = f"{_PREFIX}{path}"
        for expert, own in enumerate(_by_expert(key, tensor, match["pair"], r)):
            split[f"{stem}.{expert}.{here[-1 - depth]}.{match['pair']}.weight"] = own
    modules = config.get("target_modules") or ()
    if isinstance(modules, str):  # a pattern is not run: the tensors say where they belong
        modules = sorted({m["path"] for key in split if (m := _FUSED.fullmatch(key))})
    named = [name for p in parameters for name in _paths_of(p, state)]
    return {**config, "target_modules": sorted({*modules, *named})}, split


def _paths_of(parameter: str, state: State) -> list[str]:
    """The paths of the fused parameters that a name is meant for; a router's is its module's."""
    found = {
        f"{match['path']}.{projection}"
        for key in state
        if (match := _FUSED.fullmatch(key))
        for projection in _PROJECTIONS
        if _is_named(match["path"], projection, [parameter])
    }
    return sorted(found) or [parameter.removesuffix(".weight")]


def _is_named(path: str, projection: str, parameters: list[str]) -> bool:
    """Tells whether a parameter of a module is meant; a bare name is one of `experts` alone."""
    name, is_experts = f"{path}.{projection}", path.rpartition(".")[2] == "experts"
    dotted = [p for p in parameters if "." in p]
    is_bare = is_experts and projection in parameters
    return is_bare or any(name == p or name.endswith(f".{p}") for p in dotted)


def _by_expert(key: str, tensor: torch.Tensor, pair: str, r: int) -> list[torch.Tensor]:
    axis = 0 if pair == "lora_A" else 1
    if tensor.ndim != 2 or tensor.shape[axis] % r:
        raise AdapterError(
            f"adapter_model.safetensors: {key} is {tuple(tensor.shape)}; its side {axis} should be "
            f"a multiple of r={r}, one for each expert"
        )
    if pair == "lora_A":
        return list(tensor.split(r))
    return list(tensor.unflatten(1, (r, tensor.shape[1] // r)).unbind(-1))
