"""`plan --advise`: a recipe for a model on some hardware, chosen by the memory model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft.core.errors import ConfigError
from graft.core.model import Listed, StrictModel

if TYPE_CHECKING:
    from graft.engine.memory.cap import MemoryCap
    from graft.recipe.sections import Recipe

_MAX_LENGTH = 1024
_BATCH_SIZE = 16


class Advice(StrictModel):
    """A recipe that fits, and what else would."""

    model: str
    hardware: str
    recipe: str
    """YAML; it names data files that are to be replaced."""
    changes: dict[str, Any]
    """What was needed beside the method itself: setting → value."""
    device_bytes: int
    """Of one device at the peak."""
    device_memory: int
    host_bytes: int
    """Of the host, for each device."""
    largest: dict[str, int]
    """Parts on the device → bytes, the largest first."""
    alternatives: Listed[dict[str, Any]]
    """Other changes that fit, the best first."""


def advise(
    model: str,
    *,
    home: Path,
    gpu: str | None = None,
    cluster: Path | None = None,
    method: str = "lora",
    host_memory: str | None = None,
) -> Advice:
    """Chooses quantization, ZeRO stage, offload and checkpointing for a method.

    Args:
        model: As `model.source`; its `config.json` alone is read.
        home: Where models are kept.
        gpu: Accelerators, `4x A100-40GB`; None is this machine.
        cluster: A `ray up` or KubeRay file whose accelerators are meant.
        method: Type of the tuning method.
        host_memory: Of the host for each GPU, `256GB`; None is a usual one.

    Raises:
        ConfigError: Nothing fits, or the method or the hardware is unknown.
        ModelError: The model is unknown or unreachable.
    """
    from graft.engine.memory.cap import MemoryCap
    from graft.engine.memory.shape import ModelShape
    from graft.models import find_config
    from graft.pipelines.plan_memory import find_target

    recipe = plain_recipe(model, method, devices=1)
    target = find_target(gpu, cluster, recipe, host_memory)
    recipe = plain_recipe(model, method, devices=target.devices)
    cap = MemoryCap(ModelShape.of(find_config(recipe.model, home)), target.limits)
    return advise_for(recipe, cap, hardware=target.name, devices=target.devices)


def advise_for(recipe: Recipe, cap: MemoryCap, *, hardware: str, devices: int) -> Advice:
    """The same for a recipe and its cap.

    Raises:
        ConfigError: No combination fits.
    """
    from graft.engine.memory.fit import apply, nearest_that_fit
    from graft.recipe.load import to_yaml

    found = nearest_that_fit(recipe, cap, devices=devices)
    if not found:
        raise ConfigError(
            f"nothing fits {recipe.model.source} on {hardware} with method {recipe.method.type}: "
            f"{cap.refusal(recipe)}; take more or larger GPUs, another method, or more "
            "--host-memory for offload"
        )
    best = found[0]
    chosen = apply(recipe, best.changes)
    assert chosen is not None
    estimate = cap.predict(chosen)
    return Advice(
        model=recipe.model.source,
        hardware=hardware,
        recipe=to_yaml(_short(chosen)),
        changes=best.changes,
        device_bytes=best.device_bytes,
        device_memory=cap.limit(chosen),
        host_bytes=best.host_bytes,
        largest={part.name: part.size_bytes for part in estimate.largest(4)},
        alternatives=tuple(alternative.changes for alternative in found[1:]),
    )


def plain_recipe(model: str, method: str, *, devices: int) -> Recipe:
    """The method as it is, on all devices, with nothing that saves memory."""
    from pydantic import ValidationError

    from graft.recipe.sections import Recipe

    try:
        return Recipe.model_validate(
            {
                "model": {"source": model},
                "data": {
                    "train": "data/train.jsonl",
                    "eval": "data/eval.jsonl",
                    "max_length": _MAX_LENGTH,
                },
                "method": {"type": method},
                "train": {"batch_size": max(_BATCH_SIZE, devices)},
                "scale": {"workers": devices},
            }
        )
    except ValidationError as error:
        words = "; ".join(str(problem["msg"]) for problem in error.errors())
        raise ConfigError(f"--advise: {words}") from error


def _short(recipe: Recipe) -> dict[str, Any]:
    """What the recipe says that is no default."""
    content = recipe.model_dump(mode="json", exclude_defaults=True)
    content["method"] = {"type": recipe.method.type, **content.get("method", {})}
    return {"version": recipe.version, "name": "advised", **content}
