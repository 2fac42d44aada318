"""How long the trials of a space are, in steps and in tokens: what rungs and budgets count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

from graft.core.errors import ConfigError
from graft.objectives.sampling import SamplingObjective

if TYPE_CHECKING:
    from graft.data.prepare import PreparedData
    from graft.data.records import TokenRow
    from graft.recipe.search import SearchSection
    from graft.recipe.sections import Recipe
    from graft.recipe.space import RecipeSpace


class TrialTokens(NamedTuple):
    """What trials of a space train on."""

    fewest: int
    """The shortest complete one has so many at least, whichever rows it takes."""
    most: int
    """The longest one has about so many: its rows are taken to be as long as the mean."""


def most_steps(space: RecipeSpace) -> int:
    """Returns the steps of the longest trial that a space allows."""
    return max(recipe.train.steps for recipe in space.examples())


def trial_tokens(
    space: RecipeSpace, home: Path, prepared: Mapping[str, PreparedData] | None = None
) -> TrialTokens:
    """Counts the tokens of the shortest and of the longest trial that a space allows.

    Sampled answers are taken to be as short as they can be, and as long as they may be.

    Args:
        space: What trials are of.
        home: Where base models are kept.
        prepared: Rows that there are already, by the objective's `row_key`.

    Raises:
        ModelError: The tokenizer is missing.
        DataError: The rows are unusable.
    """
    recipes = space.examples()
    by_rows = {recipe.objective.row_key: recipe for recipe in recipes}
    known = prepared or {}
    rows = {
        key: known[key].train if key in known else training_rows(recipe, home)
        for key, recipe in by_rows.items()
    }
    spans = [_row_span(recipe, rows[recipe.objective.row_key]) for recipe in recipes]
    batch_sizes = [recipe.train.batch_size for recipe in recipes]
    steps = min(_fewest_steps(recipe) for recipe in recipes)
    return TrialTokens(
        fewest=steps * min(batch_sizes) * min(low for low, _ in spans),
        most=round(most_steps(space) * max(batch_sizes) * max(high for _, high in spans)),
    )


def training_rows(recipe: Recipe, home: Path) -> list[TokenRow]:
    """Prepares a recipe's training rows; needs the base's tokenizer and none of its weights.

    Raises:
        ModelError: The tokenizer is missing.
        DataError: The rows are unusable.
    """
    from graft.data.mixture import prepare_parts
    from graft.data.template import ChatTemplate
    from graft.models import find_config, load_tokenizer_in

    template = ChatTemplate(load_tokenizer_in(find_config(recipe.model, home)))
    return prepare_parts(recipe.parts, template).train


def require_lengths(search: SearchSection, tokens: TrialTokens) -> None:
    """Refuses what no trial of a space comes to, before any is begun.

    Raises:
        ConfigError: `search.max_tokens` is less than any trial takes, or the first rung is beyond
            the longest one.
    """
    if search.max_tokens is not None and search.max_tokens < tokens.fewest:
        raise ConfigError(
            f"search.max_tokens {search.max_tokens} allows no trial: the shortest one of this "
            f"space trains on {tokens.fewest} tokens at least; give so many or more, or fewer "
            "train.steps"
        )
    scheduler = search.scheduler
    if scheduler.type == "none" or not isinstance(scheduler.grace_tokens, int):
        return
    if scheduler.grace_tokens > tokens.most:
        raise ConfigError(
            f"search.scheduler.grace_tokens {scheduler.grace_tokens} is beyond the longest trial "
            f"of this space, about {tokens.most} tokens, so that none would be stopped early; give "
            "fewer, or auto for a quarter of it, or scheduler {type: none}"
        )


def _fewest_steps(recipe: Recipe) -> int:
    """Steps after which a trial may be complete."""
    settings = recipe.train
    may_stop = settings.stop_at_loss is not None
    return min(settings.steps, settings.report_every) if may_stop else settings.steps


def _row_span(recipe: Recipe, rows: Sequence[TokenRow]) -> tuple[int, float]:
    """Tokens of the shortest row and of a mean one, as they are trained on."""
    objective = recipe.objective
    if not isinstance(objective, SamplingObjective):
        lengths = [len(row.input_ids) for row in rows]
        return min(lengths), fmean(lengths)
    prompts = [row.num_prompt_tokens for row in rows]
    longest = objective.group_size * objective.max_new_tokens
    return min(prompts) + objective.group_size, fmean(prompts) + longest
