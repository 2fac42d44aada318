"""What a renewal is begun with: the champion, the rows, and the recipe of a small search."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft.artifacts import Store, StoredAdapter
from graft.core.model import StrictModel
from graft.pipelines.forms import recipe_of
from graft.pipelines.renewal_data import RenewalData, compose
from graft.recipe.mixture import require_single

if TYPE_CHECKING:
    from graft.recipe.sections import Recipe
    from graft.recipe.space import Sections

LR_FACTOR = 10.0
"""The learning rate is searched from the champion's over this to the champion's own: at the rate
that taught them, trained weights forget."""


class RenewalPlan(StrictModel):
    """What a renewal was begun with; it does not change when data or aliases do."""

    champion_version: int
    champion_digest: str
    started_from: str
    """Digest of the champion as it was trained, before compression: trials start from it."""
    data: RenewalData
    recipe: dict[str, Any]
    """Of the search; only the learning rate is open."""


def make_plan(store: Store, name: str, sections: Sections, folder: Path, study: str) -> RenewalPlan:
    """Looks up the champion and writes the rows of its renewal.

    Args:
        store: Where the champion is.
        name: The served name.
        sections: Of the user's recipe.
        folder: Where the rows go.
        study: The search's name.

    Raises:
        AdapterError: There is no champion, or it is damaged.
        ConfigError: The recipe lacks what a renewal needs.
        DataError: The new rows are unusable.
    """
    state = store.names.state(name)
    version = state.alias("champion")
    champion = store.open(state.digest(version))
    trained = trained_form(store, champion)
    recipe = recipe_of(trained)
    data = compose(
        require_single(sections.data, "a renewal"),
        sections.loop,
        folder,
        seed=recipe.train.seed,
        older=[require_single(recipe.data, "a renewal of this champion")],
    )
    return RenewalPlan(
        champion_version=version,
        champion_digest=str(champion.digest),
        started_from=str(trained.digest),
        data=data,
        recipe=derive_recipe(recipe, sections, data, str(trained.digest), study),
    )


def trained_form(store: Store, stored: StoredAdapter) -> StoredAdapter:
    """Returns what an adapter was before it was compressed; itself where it was not."""
    for parent in stored.record.parents:
        if parent.relation == "compressed":
            return trained_form(store, store.open(parent.digest))
    return stored


def derive_recipe(
    champion: Recipe, sections: Sections, data: RenewalData, started_from: str, study: str
) -> dict[str, Any]:
    """Returns the recipe of the scoped search: the champion's, open in its learning rate only.

    Args:
        champion: What the champion was trained with.
        sections: Of the user's recipe: how to search, to measure and to renew.
        data: The rows.
        started_from: Digest whose weights the trials start from.
        study: The search's name.
    """
    content = champion.model_dump(mode="json")
    lr, steps = champion.train.lr, sections.loop.steps or champion.train.steps
    search = sections.search.model_dump(mode="json")
    search |= {
        "trials": sections.loop.budget_trials,
        "finalists": min(sections.search.finalists, sections.loop.budget_trials),
        "space": "recipe",
        "points": [{"train.lr": lr / math.sqrt(LR_FACTOR)}],
        "points_from": [],
        "warm_start": [],
        "sampler": "auto" if search["sampler"] == "grid" else search["sampler"],
    }
    grace_steps = search["scheduler"].get("grace_steps")
    if grace_steps is not None and grace_steps > steps:
        search["scheduler"]["grace_steps"] = None
    if search["scheduler"].get("grace_tokens") is not None:
        search["scheduler"]["grace_tokens"] = "auto"  # of these rows and steps
    content["data"] |= {"train": data.train, "eval": data.search, "format": "auto"}
    content["data"] |= {"system": None, "limit": None, "eval_limit": None}
    content["train"] |= {
        "steps": steps,
        "init_from": started_from,
        "lr": {"log": [lr / LR_FACTOR, lr]},
    }
    same = {part: getattr(sections, part).model_dump(mode="json") for part in ("eval", "track")}
    return content | same | {"name": study, "search": search}
