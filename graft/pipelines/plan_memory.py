"""What each kind of trial takes at the worst point of the space, on the planned hardware."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from graft.core.errors import ConfigError
from graft.core.model import Listed, StrictModel
from graft.core.spaces import Choice, Space
from graft.recipe.holes import middle

if TYPE_CHECKING:
    from graft.engine.memory.cap import Limits, MemoryCap
    from graft.pipelines.plan_time import Speed
    from graft.recipe.sections import Recipe
    from graft.recipe.space import RecipeSpace

_GIB = 2**30
_HOST_BYTES = {"RTX": 64 * _GIB, "": 200 * _GIB}
"""Host memory beside each GPU: of a workstation, and of a server's share."""
_NO_MEMORY = frozenset(
    f"train/{name}"
    for name in (
        "lr",
        "schedule",
        "warmup_fraction",
        "weight_decay",
        "betas",
        "eps",
        "steps",
        "seed",
    )
)
"""Holes that change no memory."""


class Target(NamedTuple):
    """Hardware that is planned for."""

    name: str
    limits: Limits
    devices: int
    speed: Speed | None
    """None where nothing is known of it."""
    is_named: bool = False
    """There are no more devices than these; else the machine's or the cluster's are not counted."""


class PlannedMemory(StrictModel):
    """The most that one worker of a kind of trial takes."""

    device_bytes: int
    host_bytes: int
    nvme_bytes: int
    moment: str
    """When: `training step`, `loading`, ..."""
    largest: dict[str, int]
    """Part → bytes, the largest first."""
    limit_bytes: int
    reason: str
    """Why it does not fit; empty where it does."""
    at: dict[str, str]
    """Values of the holes at the worst point."""
    slots: int
    """Trials of the kind that fit on one base together; 1 where it does not pack."""
    alternatives: Listed[dict[str, Any]] = ()
    """Changes with which the worst point fits, the best first."""


def find_target(
    gpu: str | None, cluster: Path | None, recipe: Recipe, host_memory: str | None = None
) -> Target:
    """Says what is planned for: named GPUs, those of a cluster file, or this machine.

    Raises:
        ConfigError: The name or the file is not understood.
    """
    from graft.core.machine import gpu_memory_bytes, host_memory_bytes
    from graft.core.sizes import parse_bytes
    from graft.engine.memory.cap import Limits
    from graft.engine.memory.hardware import parse_hardware
    from graft.models import torch_dtype
    from graft.pipelines.cluster_file import read_cluster
    from graft.pipelines.plan_time import cpu_speed, gpu_speed

    if gpu is None and cluster is None:
        if host_memory is not None:
            raise ConfigError("--host-memory is beside named GPUs: give --gpu or --cluster")
        if recipe.model.device != "cpu" and (size := gpu_memory_bytes()):
            limits = Limits("cuda", size, host_memory_bytes())
            return Target("the GPU of this machine", limits, 1, None)
        limits = Limits("cpu", host_memory_bytes())
        return Target("this machine's CPU", limits, 1, cpu_speed(torch_dtype(recipe.model)))
    hardware = read_cluster(cluster, gpu) if cluster is not None else parse_hardware(str(gpu))
    host = next(size for name, size in _HOST_BYTES.items() if hardware.gpu.name.startswith(name))
    try:
        each = parse_bytes(host_memory) if host_memory is not None else host
    except ValueError as error:
        raise ConfigError(f"--host-memory: {error}") from error
    limits = Limits("cuda", hardware.gpu.memory_bytes, each, node_workers=1)
    chosen = hardware.gpu
    speed = gpu_speed(chosen.name, chosen.flops, chosen.bytes_per_s)
    return Target(str(hardware), limits, hardware.count, speed, is_named=True)


def plan_memory(
    space: RecipeSpace, choices: Mapping[str, Any], cap: MemoryCap, *, devices: int, packs: bool
) -> PlannedMemory:
    """Finds the worst point among the trials of one kind, and what would make it fit.

    Args:
        space: Of the search.
        choices: Name → label, which make the kind.
        cap: What may be used.
        devices: That may be used, one a worker.
        packs: Several trials of this kind train on one base.
    """
    from graft.engine.memory.fit import nearest_that_fit

    recipe, params = _worst(space, choices, cap)
    estimate, reason = cap.predict(recipe), cap.refusal(recipe)
    found = [] if reason is None else nearest_that_fit(recipe, cap, devices=devices)
    limit = recipe.search.pack_slots if packs and reason is None else 1
    slots = next((n for n in range(limit, 1, -1) if cap.fits([recipe] * n)), 1)
    return PlannedMemory(
        device_bytes=estimate.device_bytes,
        host_bytes=estimate.host_bytes,
        nvme_bytes=estimate.nvme_bytes,
        moment=estimate.peak.name,
        largest={part.name: part.size_bytes for part in estimate.largest(4)},
        limit_bytes=cap.limit(recipe),
        reason=reason or "",
        at={name: str(value) for name, value in params.items() if name not in choices},
        slots=slots,
        alternatives=tuple(alternative.changes for alternative in found),
    )


def _worst(
    space: RecipeSpace, choices: Mapping[str, Any], cap: MemoryCap
) -> tuple[Recipe, dict[str, Any]]:
    """Starts where all numbers are at their highest, then tries every choice and end for itself."""
    best = _sampled(space, choices)
    if best is None:  # only the middle is allowed
        best = _sampled(space, choices, _usual)
    if best is None:
        raise ConfigError("no point of this kind is allowed")
    for name, known in space.holes.items():
        if name in choices or name in _NO_MEMORY:
            continue
        for value in _tried(known):
            tried = _sampled(space, {**best[1], name: value})
            if tried and _size(cap, tried[0]) > _size(cap, best[0]):
                best = tried
    return best


def _tried(known: Space) -> Sequence[Any]:
    """Of numbers both ends: workers and reduction factors take less the higher they are."""
    if not isinstance(known, Choice):
        return known.low, known.high
    return (min(known.values), max(known.values)) if _is_number(known) else known.values


def _size(cap: MemoryCap, recipe: Recipe) -> int:
    return cap.predict(recipe).device_bytes


def _sampled(
    space: RecipeSpace, choices: Mapping[str, Any], others: Any = None
) -> tuple[Recipe, dict[str, Any]] | None:
    params: dict[str, Any] = {}

    def suggest(name: str, known: Space) -> Any:
        params[name] = choices.get(name, (others or _highest)(name, known))
        return params[name]

    try:
        return space.sample(suggest), params
    except ConfigError:
        return None


def _highest(name: str, known: Space) -> Any:
    if name in _NO_MEMORY:
        return middle(known)
    if isinstance(known, Choice):
        return max(known.values) if _is_number(known) else middle(known)
    return known.high


def _usual(name: str, known: Space) -> Any:
    return middle(known)


def _is_number(known: Space) -> bool:
    if not isinstance(known, Choice):
        return True
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in known.values)
