"""The nearest combination that fits: method, quantization, ZeRO stage, offload and checkpointing.

Each change has a price, a rough share of a step's time or of what is learned. Combinations are
tried from the cheapest on, so the first that fits is the best.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pydantic import ValidationError

from graft.core.errors import ConfigError
from graft.core.model import StrictModel
from graft.engine.memory.cap import MemoryCap
from graft.engine.memory.workload import Workload
from graft.methods._own_weights import OwnWeightsMethod
from graft.recipe.sections import Recipe


class _Change(NamedTuple):
    """Settings by path, and what they cost."""

    settings: Mapping[str, Any]
    price: float


_NOTHING = _Change({}, 0.0)

_CHECKPOINTING = _Change({"scale.gradient_checkpointing": True}, 0.4)
"""A second forward pass: a third to a half more work, by whether weights are trained."""
_QUANTIZATIONS = (
    _Change({"model.quantization.type": "nf4"}, 0.7),
    _Change({"model.quantization.type": "int8"}, 0.8),
)
"""Weights are unpacked in every pass, and are not quite the base's; int8 saves less."""
_ZERO = (
    _Change({"scale.zero_stage": 2}, 0.1),
    _Change({"scale.zero_stage": 3}, 0.5),
)
"""Stage 3 gathers weights in both passes: half as much again to send (arXiv 1910.02054, 7.2)."""
_OFFLOAD = (
    _Change({"scale.zero_stage": 2, "scale.offload.optimizer": "cpu"}, 0.6),
    _Change({"scale.zero_stage": 3, "scale.offload.optimizer": "cpu"}, 1.0),
    _Change(
        {
            "scale.zero_stage": 3,
            "scale.offload.optimizer": "cpu",
            "scale.offload.parameters": "cpu",
        },
        2.5,
    ),
)
"""The last one sends the whole base over PCIe in every pass."""
_OTHER_METHOD = _Change({"method": {"type": "lora"}}, 1.5)
_SHORT_BATCH = 0.2


class Alternative(StrictModel):
    """A combination that fits."""

    changes: dict[str, Any]
    """Setting → value, each as `--set` takes it."""
    device_bytes: int
    """Of one worker, with the correction of trials that ran out."""
    host_bytes: int


def nearest_that_fit(
    recipe: Recipe, cap: MemoryCap, *, devices: int = 1, count: int = 3
) -> list[Alternative]:
    """Finds combinations that fit, the best first; one that only adds to another is left out.

    Args:
        recipe: Complete; where it fits itself the first answer has no changes.
        cap: What may be used.
        devices: That may be used, one a worker.
        count: At most so many.
    """
    found: list[Alternative] = []
    offloads = cap.limits.device != "cpu"
    for change in _combinations(recipe, devices, offloads=offloads):
        if any(known.changes.items() <= change.settings.items() for known in found):
            continue
        changed = apply(recipe, change.settings)
        if changed is None or not _fits(changed, cap):
            continue
        found.append(
            Alternative(
                changes=dict(change.settings),
                device_bytes=round(cap.need([changed])),
                host_bytes=cap.predict(changed).host_bytes,
            )
        )
        if len(found) == count:
            break
    return found


def apply(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe | None:
    """Returns the recipe with some settings changed; None where that combination is refused."""
    content = recipe.model_dump(mode="json")
    if "method" in settings and recipe.train.lr == recipe.method.default_lr:
        del content["train"]["lr"]  # the other method has one of its own
    for path, value in settings.items():
        *sections, field = path.split(".")
        section = content
        for name in sections:
            section = section[name]
        section[field] = value
    try:
        return Recipe.model_validate(content)
    except ValidationError:
        return None


def _fits(recipe: Recipe, cap: MemoryCap) -> bool:
    try:
        return not cap.surely_exceeds(recipe) and cap.refusal(recipe) is None
    except ConfigError:  # the method does not fit the base
        return False


def _combinations(recipe: Recipe, devices: int, *, offloads: bool) -> list[_Change]:
    """All combinations of one change from each axis, the cheapest first."""
    axes = [
        list(axis)
        for axis in (
            _methods(recipe),
            _quantizations(recipe),
            _shardings(recipe, devices, offloads=offloads),
            _checkpointings(recipe),
            _batches(recipe),
        )
    ]
    combined = [
        _Change(
            {path: value for change in chosen for path, value in change.settings.items()},
            sum(change.price for change in chosen),
        )
        for chosen in itertools.product(*axes)
    ]
    return sorted(combined, key=lambda change: (change.price, len(change.settings)))


def _methods(recipe: Recipe) -> Iterator[_Change]:
    yield _NOTHING
    if isinstance(recipe.method, OwnWeightsMethod):
        yield _OTHER_METHOD


def _quantizations(recipe: Recipe) -> Iterator[_Change]:
    yield _NOTHING
    if recipe.model.quantization.type == "none":
        yield from _QUANTIZATIONS
    elif recipe.model.quantization.type == "int8":
        yield _QUANTIZATIONS[0]


def _shardings(recipe: Recipe, devices: int, *, offloads: bool) -> Iterator[_Change]:
    """ZeRO, and what it moves from a device to its host, which a CPU itself is."""
    yield _NOTHING
    workers = max(devices, recipe.scale.max_workers)
    if workers > recipe.train.batch_size:
        workers = recipe.train.batch_size
    more = {} if workers == recipe.scale.max_workers else {"scale.workers": workers}
    for change in (*(_ZERO if workers > 1 else ()), *(_OFFLOAD if offloads else ())):
        if change.settings["scale.zero_stage"] >= recipe.scale.zero_stage:
            yield _Change({**more, **change.settings}, change.price)


def _checkpointings(recipe: Recipe) -> Iterator[_Change]:
    yield _NOTHING
    if not recipe.scale.gradient_checkpointing:
        yield _CHECKPOINTING


def _batches(recipe: Recipe) -> Iterator[_Change]:
    yield _NOTHING
    longest = Workload.bound(recipe).row_tokens
    if longest < recipe.train.micro_batch_tokens:
        yield _Change({"train.micro_batch_tokens": longest}, _SHORT_BATCH)
