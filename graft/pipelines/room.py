"""Whether one recipe has room on this machine, asked before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from graft.core.errors import ConfigError
from graft.core.machine import gpu_memory_bytes, host_memory_bytes
from graft.core.settings import settings_in_words

if TYPE_CHECKING:
    from graft.engine.memory.cap import Limits
    from graft.recipe.sections import Recipe

_UNKNOWN_BYTES = 2**62
"""Of a GPU that does not tell: `scale.device_memory` alone counts."""


def require_room(recipe: Recipe, home: Path, *, limits: Limits | None = None) -> None:
    """Refuses a recipe that is predicted to need more than `scale.device_memory`, or than there is.

    Args:
        recipe: Complete.
        home: Where models are kept.
        limits: Of the machines that it runs on; None means this one's.

    Raises:
        ConfigError: With its largest parts, and the nearest combination that fits.
    """
    from graft.engine.memory.cap import MemoryCap
    from graft.engine.memory.fit import nearest_that_fit
    from graft.engine.memory.shape import ModelShape
    from graft.models import resolve_model

    shape = ModelShape.of(resolve_model(recipe.model, home))
    cap = MemoryCap(shape, limits or _own_limits(recipe))
    reason = cap.refusal(recipe)
    if reason is None:
        return
    found = nearest_that_fit(recipe, cap, count=2)
    fits = " or ".join(settings_in_words(alternative.changes) for alternative in found)
    raise ConfigError(
        f"not enough memory: {reason}. "
        + (f"What fits: {fits}" if fits else "No change that is known would make it fit")
    )


def _own_limits(recipe: Recipe) -> Limits:
    from graft.engine.memory.cap import Limits
    from graft.models import pick_device

    if pick_device(recipe.model).type == "cpu":
        return Limits("cpu", host_memory_bytes())
    return Limits("cuda", gpu_memory_bytes() or _UNKNOWN_BYTES, host_memory_bytes())
