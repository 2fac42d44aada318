"""Who takes part in a comparison, each with the recipe space that it is searched in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from graft.core.errors import ConfigError
from graft.core.registry import nearest
from graft.core.spaces import Space
from graft.methods.base import METHODS
from graft.recipe.costs import COSTS
from graft.recipe.holes import contains, middle
from graft.recipe.sections import CompareVariant, Recipe
from graft.recipe.seeds import fresh_seeds
from graft.recipe.space import RecipeSpace
from graft.recipe.tree import Tree

ALL = "all"

_OF_TUNE = ("points", "points_from", "warm_start", "finalists")
"""Keys of `search` that a comparison has its own form of."""

_MEASURED = ("eval/", "method/")
"""What names of metrics that a searched point reports begin with."""

_TOO_PARTICULAR = {
    "init_from": "starts from one method's adapter; a comparison starts every method anew",
    "stop_at_loss": "ends trainings at different steps; in a comparison all are equally long",
}


@dataclass(frozen=True)
class Contestant:
    """A method as it is compared."""

    name: str
    method: str
    """Its registered type."""
    quantization: str
    """Of the base: its type; `nf4-single` is nf4 with plain constants."""
    space: RecipeSpace | None
    """Of its search, `train.steps` being those of a searched point; None where it is refused."""
    reason: str | None = None
    """Why it is refused."""

    @property
    def num_points(self) -> int:
        """Points of its search: the budget, or the only one where nothing is open."""
        if self.space is None:
            return 0
        return 1 if self.space.is_complete else self.space.sections().search.trials

    def start(self) -> dict[str, Any]:
        """Returns the first point: the method's own defaults, the middle of other ranges."""
        assert self.space is not None  # only who takes part is searched
        fields = METHODS.get(self.method).model_fields
        return {name: _start(name, hole, fields) for name, hole in self.space.holes.items()}


def contestants(space: RecipeSpace, methods: Sequence[str], budget: int) -> list[Contestant]:
    """Looks up the methods and opens each one's own search space.

    The recipe's own `method` and `train.lr` are not read: one setting for all would decide the
    winner in advance. Its other holes stay open for everybody.

    Args:
        space: The recipe.
        methods: Names of registered types and of variants; `all` is every one.
        budget: Points a method.

    Raises:
        ConfigError: A name is unknown, or the recipe cannot be compared with.
    """
    require_comparable(space)
    variants = {variant.name: variant for variant in space.sections().compare.variants}
    return [
        _contestant(name, variants.get(name), space, budget) for name in _names(methods, variants)
    ]


_SAME_FOR_ALL = {
    "steps": "is the length of every method's final training",
    "batch_size": "says how many rows each of its steps learns from",
    "seed": "is that of every searched point, and finals have others",
}


def require_comparable(space: RecipeSpace) -> None:
    """Refuses a recipe under which methods cannot be compared.

    Raises:
        ConfigError: Says which setting, and what to write.
    """
    recipe = space.example()
    if recipe.data.eval is None:
        raise ConfigError("data.eval is absent; a comparison measures held-out rows: name them")
    if costs := [o.metric for o in recipe.search.objectives if o.metric in COSTS]:
        raise ConfigError(
            f"search.objectives names {', '.join(costs)}, and a comparison searches for "
            "quality alone; size, memory and speed are columns of its own: leave the costs out"
        )
    told = [o.metric for o in recipe.search.objectives if not o.metric.startswith(_MEASURED)]
    if told:
        raise ConfigError(
            f"search.objectives names {', '.join(told)}, and a comparison measures held-out rows "
            "alone: name what begins with eval/ or method/"
        )
    if recipe.compare.general is not None and recipe.objective.scores_answers:
        raise ConfigError(
            "compare.general measures perplexity on plain text, and a reward model has none: "
            "remove it"
        )
    bounds = ("max_hours", "max_tokens")
    if bounded := [name for name in bounds if getattr(recipe.search, name) is not None]:
        raise ConfigError(
            f"search.{bounded[0]} ends a search early, and a comparison gives every method the "
            "same points (--budget, or search.trials): remove it"
        )
    if recipe.scale.needs_deepspeed:
        raise ConfigError(
            "a comparison trains each method in one process of its own; set scale.workers: 1, "
            "scale.zero_stage: 0 and scale.backend: torch"
        )
    _require_one_training(space)


def _require_one_training(space: RecipeSpace) -> None:
    """Refuses settings of `train` that would not be the same for all methods."""
    recipe, train = space.example(), space.content().get("train", {})
    for key, why in _SAME_FOR_ALL.items():
        if "choice" in train or isinstance(train.get(key), dict):
            raise ConfigError(f"train.{key} {why}; give one number, and train as one section")
    for key, why in _TOO_PARTICULAR.items():
        if getattr(recipe.train, key) is not None:
            raise ConfigError(f"train.{key} {why}: remove it")


def _names(methods: Sequence[str], variants: dict[str, CompareVariant]) -> list[str]:
    known = list(dict.fromkeys([*METHODS.names(), *variants]))
    for name in methods:
        if name != ALL and name not in known:
            raise ConfigError(
                f"no method or variant is called {name!r}.{nearest(name, known)} "
                f"Known: {', '.join(known)}"
            )
    if not methods:
        raise ConfigError(f"no method is named; give {ALL}, or some of {', '.join(known)}")
    if ALL not in methods:
        return list(dict.fromkeys(methods))
    stand_in = {v.method.type for v in variants.values() if _is_plain(v)}
    return [name for name in known if name in variants or name not in stand_in]


def _is_plain(variant: CompareVariant) -> bool:
    """Tells whether a variant is its type as it stands under another name, `peft` as `vera`."""
    fields = type(variant.method).model_fields
    return variant.quantization is None and all(
        getattr(variant.method, name) == field.get_default(call_default_factory=True)
        for name, field in fields.items()
    )


def _contestant(
    name: str, variant: CompareVariant | None, space: RecipeSpace, budget: int
) -> Contestant:
    content = space.content()
    method: Any = {"type": name}
    content["model"] = dict(content["model"])
    if variant is not None:
        index = list(space.sections().compare.variants).index(variant)
        method = content["compare"]["variants"][index]["method"]
        if variant.quantization is not None:
            content["model"]["quantization"] = variant.quantization.model_dump(mode="json")
    kind = method if isinstance(method, str) else str(method["type"])
    own_store = variant.quantization if variant else None
    quantization = own_store or space.sections().model.quantization
    is_single = quantization.type == "nf4" and not quantization.double
    store = "nf4-single" if is_single else quantization.type
    content["method"] = method
    content["train"] = {k: v for k, v in content.get("train", {}).items() if k != "lr"}
    content["train"]["steps"] = steps = space.sections().compare.search_steps
    search = {k: v for k, v in content.get("search", {}).items() if k not in _OF_TUNE}
    content["search"] = {**search, "space": "auto", "trials": budget}
    try:
        own = RecipeSpace(Tree(f"the recipe with {name}", content))
    except ConfigError as error:
        words = str(error)
        if "train.steps" in words:
            words += f"; while a comparison searches, that is compare.search_steps, {steps}"
        return Contestant(name, kind, store, None, words)
    return Contestant(name, kind, store, own)


def _start(name: str, hole: Space, fields: dict[str, Any]) -> Any:
    section, _, field = name.partition("/")
    if section == "method" and field in fields:
        default = fields[field].get_default(call_default_factory=True)
        if contains(hole, default):
            return default
    return middle(hole)


def final_recipe(best: Recipe, *, steps: int, seed: int) -> Recipe:
    """Returns a searched recipe at its full length and on another seed.

    Raises:
        ConfigError: The method refuses that length.
    """
    from pydantic import ValidationError

    content = best.model_dump(mode="json")
    content["train"] |= {"steps": steps, "seed": seed}
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        words = "; ".join(str(detail["msg"]) for detail in error.errors(include_url=False))
        raise ConfigError(f"at train.steps {steps}: {words}") from error


def final_recipes(contestant: Contestant, params: dict[str, Any], steps: int) -> list[Recipe]:
    """Returns a searched point at its full length, once a seed that the search has not seen.

    Raises:
        ConfigError: The method refuses that length.
    """
    assert contestant.space is not None  # refused ones have no point
    best = contestant.space.fix(params)
    seeds = fresh_seeds([best.train.seed], best.compare.seeds)
    return [final_recipe(best, steps=steps, seed=seed) for seed in seeds]
