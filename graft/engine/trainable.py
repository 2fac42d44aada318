"""What a recipe asks of the device that it trains on."""

from __future__ import annotations

import importlib.util

import torch

from graft.core.errors import ConfigError, MissingDependencyError
from graft.recipe.sections import Recipe


def require_trainable(recipe: Recipe, device: torch.device) -> None:
    """Refuses what this device or this installation cannot train.

    Asked in the process that trains, before the base is loaded where the device is known by then.

    Raises:
        ConfigError: It trains on a GPU only.
        MissingDependencyError: Its optimizer is of a package that is not installed.
    """
    if device.type != "cuda" and recipe.needs_cuda:
        raise ConfigError("; ".join(recipe.needs_cuda))
    is_there = importlib.util.find_spec("bitsandbytes") is not None
    if recipe.train.optimizer != "adamw" and not is_there:
        raise MissingDependencyError(
            f"train.optimizer {recipe.train.optimizer} needs the package bitsandbytes; install it "
            "with pip install bitsandbytes, or use adamw"
        )
