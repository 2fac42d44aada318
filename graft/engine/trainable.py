"""What a recipe asks of the device that it trains on."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

import torch

from graft.core.errors import ConfigError, GraftError, MissingDependencyError
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


def require_any_trainable(recipes: Iterable[Recipe], device: torch.device) -> None:
    """Refuses some recipes, at least one, if this device can train none of them.

    Raises:
        GraftError: What the first of them is refused for.
    """
    refusals: list[GraftError] = []
    for recipe in recipes:
        try:
            return require_trainable(recipe, device)
        except (ConfigError, MissingDependencyError) as error:
            refusals.append(error)
    raise refusals[0]
