"""Which linear layers a method adapts, picked by name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

from graft.core.errors import ConfigError
from graft.methods.base import FusedSize, Site

ALL_LINEAR = "all-linear"


def select_sites(
    linears: dict[str, tuple[int, int]],
    targets: str | tuple[str, ...],
    *,
    field: str = "target_modules",
    layers: tuple[int, ...] | None = None,
) -> tuple[Site, ...]:
    """Picks the layers whose path is, or ends with, one of the targets.

    Args:
        linears: Module path → (in_features, out_features); the output head is not among them.
        targets: `all-linear`, or path endings such as `q_proj` or `layers.0.mlp.up_proj`. Experts,
            routers and gates with one output of a mixture-of-experts base are not in `all-linear`,
            and experts have to be named as such: `experts.down_proj` is that of all experts,
            `experts.3.down_proj` of one.
        field: Of the method, for the message.
        layers: Only of these decoder layers, by number; None is all.

    Raises:
        ConfigError: A target matches no layer; the nearest names are in the message. Or the base
            has no linear layer at all, or none of `layers` has a target.
    """
    if targets == ALL_LINEAR:
        chosen = {
            name
            for name, shape in linears.items()
            if not isinstance(shape, FusedSize) and min(shape) > 1
        }
        if not chosen:
            raise ConfigError(
                f"method.{field}: the base has no linear layer below its head (GPT-2's are another "
                "kind, which is not adapted); choose prompt, prefix or full, or another base"
            )
    else:
        chosen = _named(linears, targets, field)
    if layers is not None:
        chosen = _of_layers(linears, chosen, layers)
    return tuple(Site(name, *shape) for name, shape in linears.items() if name in chosen)


def _named(
    linears: dict[str, tuple[int, int]], targets: str | tuple[str, ...], field: str
) -> set[str]:
    wanted = (targets,) if isinstance(targets, str) else targets
    matched = {
        target: [name for name, shape in linears.items() if _is_named(name, shape, target)]
        for target in wanted
    }
    for target, names in matched.items():
        if not names:
            leaves = sorted({_short_name(name, shape) for name, shape in linears.items()})
            near = difflib.get_close_matches(target, leaves, n=3) or leaves
            raise ConfigError(
                f"method.{field}: {target!r} matches no linear layer of the base model; "
                f"near names: {', '.join(near)}"
                + (f" (or {ALL_LINEAR!r})" if field == "target_modules" else "")
            )
    return {name for names in matched.values() for name in names}


_LAYER = re.compile(r".*?\.[^.]*\.(\d+)\.")
"""Finds a decoder layer's number in a path as PEFT does."""


def _of_layers(
    linears: dict[str, tuple[int, int]], names: set[str], layers: tuple[int, ...]
) -> set[str]:
    numbers = {name: int(m[1]) for name in linears if (m := _LAYER.match(name))}
    if odd := sorted(set(layers) - set(numbers.values())):
        there = f"0 to {max(numbers.values())}" if numbers else "not numbered"
        raise ConfigError(
            f"method.layers_to_transform: the base has no layer {odd[0]}; its layers are {there}"
        )
    fused = next((name for name in sorted(names) if isinstance(linears[name], FusedSize)), None)
    if fused is not None:
        raise ConfigError(
            f"method.layers_to_transform: {fused} is an expert or router, which it cannot pick; "
            f"name its layer in method.target_modules instead: {fused}"
        )
    found = {name for name in names if numbers.get(name) in layers}
    if not found:
        raise ConfigError(
            f"method.layers_to_transform: no layer of {list(layers)} has one of "
            "method.target_modules; name other layers or other modules"
        )
    return found


_EXPERT = re.compile(r"\.\d+(?=\.[^.]+$)")
"""The number in `mlp.experts.3.down_proj`."""


def _is_named(name: str, size: tuple[int, int], target: str) -> bool:
    names = [name]
    if _is_expert(name, size):
        names = [name, _EXPERT.sub("", name)] if "." in target else []
    return any(n == target or n.endswith(f".{target}") for n in names)


def _is_expert(name: str, size: tuple[int, int]) -> bool:
    return isinstance(size, FusedSize) and _EXPERT.search(name) is not None


def _short_name(name: str, size: tuple[int, int]) -> str:
    """The last part of a path; `experts.down_proj` for an expert's."""
    if _is_expert(name, size):
        return ".".join(_EXPERT.sub("", name).split(".")[-2:])
    return name.rsplit(".", 1)[-1]


def require_rank_fits(sites: Iterable[Site], rank: int, *, field: str) -> None:
    """Refuses a rank above a layer's smaller side.

    Raises:
        ConfigError: Names the first such layer and the largest rank that fits it.
    """
    for site in sites:
        largest = min(site.in_features, site.out_features)
        if rank > largest:
            raise ConfigError(
                f"method.{field}: {rank} is above the size of {site.name} "
                f"({site.out_features} x {site.in_features}); use at most {largest}"
            )


def explicit_targets(targets: str | tuple[str, ...], sites: Iterable[str]) -> list[str]:
    """Names for a file: PEFT's own `all-linear` depends on the class of the model that loads it."""
    if isinstance(targets, str):
        return sorted({site.rsplit(".", 1)[-1] for site in sites})
    return sorted(targets)


def peft_layers(given: Any) -> Any:
    """Returns PEFT's `layers_to_transform` as a list, whatever it was; None where it names none."""
    if given is None or given == []:
        return None
    return [given] if isinstance(given, int) else given
