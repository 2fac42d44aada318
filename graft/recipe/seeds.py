"""Training again what a search has found, on seeds that it has not seen."""

from __future__ import annotations

from collections.abc import Iterable

from graft.core.spaces import Int
from graft.recipe.holes import NamedHole, Suggest, make_hole
from graft.recipe.sections import Recipe
from graft.recipe.space import RecipeSpace
from graft.recipe.tree import Tree

SEED = "rerun/seed"
"""The parameter that a re-run has beside those of its trial."""

_SEEDS = Int(low=0, high=2**53 - 1)
"""What a journal keeps exactly: its numbers are doubles."""


def fresh_seeds(seen: Iterable[int], num: int) -> range:
    """Returns so many seeds above all that were seen."""
    first = max(seen) + 1
    return range(first, first + num)


def on_seed(recipe: Recipe, seed: int) -> Recipe:
    """Returns the same recipe with another `train.seed`."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": seed})})


class SeededSpace(RecipeSpace):
    """A space with one parameter more, which stands for `train.seed` whatever else says of it."""

    def __init__(self, space: RecipeSpace) -> None:
        """Opens the seed of every recipe of a space."""
        super().__init__(Tree("the recipe", space.content()))
        self._holes[SEED] = NamedHole(SEED, ("train", "seed"), make_hole(_SEEDS), {})

    def sample(self, suggest: Suggest) -> Recipe:
        """Fills the holes, the seed first: a proposal that was cut short is known by it.

        Raises:
            ConfigError: See `RecipeSpace.sample`.
        """
        seed = suggest(SEED, _SEEDS)
        return on_seed(super().sample(suggest), seed)
