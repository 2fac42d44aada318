"""What trains on this machine: settings and methods, from their own words and from trying."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from graft.core.errors import GraftError
from graft.core.model import Listed, StrictModel

if TYPE_CHECKING:
    from graft.methods.base import Surroundings

_OFFLOADS = {
    "scale.offload cpu": ("cpu_adam",),
    "scale.offload nvme": ("cpu_adam", "pin_memory", "async_io"),
}

_STEPS = 200
"""Of an ordinary run: a method may ask for more than a few."""


class SettingSupport(StrictModel):
    """One setting of a recipe, whatever the method."""

    setting: str
    """As a recipe says it: `scale.zero_stage 3`."""
    reason: str = ""
    """Why it does not work here; empty where it does."""


class MethodHere(StrictModel):
    """One method on this machine."""

    method: str
    trains_with: Listed[str]
    """Settings that it trains with here."""
    reasons: dict[str, str]
    """The other settings, and why not."""


class Support(StrictModel):
    """What trains here."""

    settings: Listed[SettingSupport]
    methods: Listed[MethodHere]


def inspect_support() -> Support:
    """Tries what the machine can do and asks every method what it can be combined with."""
    from graft.methods.base import METHODS

    settings = {name: _why_not(probe) for name, probe in _probes().items()}
    return Support(
        settings=tuple(SettingSupport(setting=k, reason=v) for k, v in settings.items()),
        methods=tuple(_method_here(name, settings) for name in METHODS.names()),
    )


def _probes() -> dict[str, Callable[[], str | None]]:
    """Setting → what says why it does not work here, or None."""
    return {
        "model.quantization int8": lambda: _quantization("int8"),
        "model.quantization nf4": lambda: _quantization("nf4"),
        **{f"scale.zero_stage {stage}": _deepspeed for stage in (1, 2, 3)},
        **{name: lambda ops=ops: _ops(ops) for name, ops in _OFFLOADS.items()},  # type: ignore[misc]
        "scale.gradient_checkpointing": lambda: None,
    }


def _why_not(probe: Callable[[], str | None]) -> str:
    try:
        return probe() or ""
    except (GraftError, ImportError, OSError, RuntimeError) as error:
        return str(error)


def _quantization(name: str) -> None:
    from graft.models.load import require_device
    from graft.models.section import ModelSection

    require_device(ModelSection.model_validate({"source": "-", "quantization": {"type": name}}))


def _deepspeed() -> str | None:
    import torch

    if importlib.util.find_spec("deepspeed") is None:
        return "the package deepspeed is not installed; pip install deepspeed"
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if not torch.distributed.is_available() or not torch.distributed.is_backend_available(backend):
        return f"this torch has no {backend}; install a build of torch for this machine"
    return None


def _ops(ops: tuple[str, ...]) -> str | None:
    from graft.engine.backends.ops import OPS, is_built, obstacle

    missing = [op for op in OPS if op in ops and not is_built(op)]
    reasons = [reason for op in missing if (reason := obstacle(op))]
    return _deepspeed() or next(iter(reasons), None)


def _method_here(name: str, settings: Mapping[str, str]) -> MethodHere:
    from graft.methods.base import METHODS

    method = METHODS.build(name)
    reasons = {}
    for setting, why in settings.items():
        refused = method.refusals(_surroundings(setting))
        if refused or why:
            reasons[setting] = "; ".join(refused) or why
    return MethodHere(
        method=name,
        trains_with=tuple(setting for setting in settings if setting not in reasons),
        reasons=reasons,
    )


def _surroundings(setting: str) -> Surroundings:
    """What a method is asked about a setting, everything else at its default."""
    from graft.methods.base import Surroundings

    key, _, value = setting.partition(" ")
    usual = Surroundings(steps=_STEPS)
    if key == "model.quantization":
        return usual._replace(quantization=value)
    if key == "scale.zero_stage":
        return usual._replace(zero_stage=int(value), needs_deepspeed=True)
    if key == "scale.offload":  # what is offloaded is sharded
        return usual._replace(zero_stage=2, needs_deepspeed=True)
    return usual._replace(gradient_checkpointing=True)
