"""`plan`: what a search would do, need and cost, without doing any of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from graft.core.errors import ConfigError, GraftError
from graft.core.model import Listed, StrictModel
from graft.core.spaces import Choice
from graft.methods.support import MethodSupport, method_support
from graft.objectives.sampling import SamplingObjective
from graft.pipelines.plan_memory import PlannedMemory, Target, find_target, plan_memory
from graft.pipelines.plan_time import PlannedTime, plan_time
from graft.recipe.holes import middle
from graft.recipe.space import RecipeSpace, describe_space
from graft.runtime.budget import Spending, read_spending
from graft.runtime.lengths import training_rows

if TYPE_CHECKING:
    from graft.engine.memory.cap import MemoryCap
    from graft.engine.memory.shape import ModelShape
    from graft.recipe.sections import Recipe

_MAX_BRANCHES = 64


class PlannedParameter(StrictModel):
    """One open setting."""

    name: str
    space: str
    """As a recipe would write it."""
    opened_by: dict[str, str]
    """Choices that must be made before it exists: name → label."""


class PlannedBranch(StrictModel):
    """One kind of trial: a choice of method and scale."""

    choices: dict[str, str]
    method: str
    executor: Literal["packed", "dedicated", "refused"]
    reason: str
    """Why it is refused; empty otherwise."""
    memory: PlannedMemory | None = None
    """At its worst point; None where the base's shape is not known."""


class Plan(StrictModel):
    """A search as it would run."""

    name: str
    trials: int
    num_combinations: int | None
    """Different recipes in the space; None where a range makes them uncountable."""
    objectives: Listed[str]
    scheduler: str
    sampler: str
    """Which one is taken, and why."""
    warning: str
    """What the budget amounts to, where it is small for the space; else empty."""
    spending: Spending | None
    """Of the study of this name, so far; None where nothing is open."""
    parameters: Listed[PlannedParameter]
    branches: Listed[PlannedBranch]
    compatibility: Listed[MethodSupport]
    hardware: str
    """What memory and time are planned for."""
    time: PlannedTime | None
    """None where the base's shape or the device's speed is not known."""
    unknown: str = ""
    """Why there is no memory or time."""


def plan(
    space: RecipeSpace,
    *,
    home: Path,
    gpu: str | None = None,
    cluster: Path | None = None,
    price: float | None = None,
    host_memory: str | None = None,
) -> Plan:
    """Resolves a recipe's space and predicts its memory and time; loads no weights.

    Args:
        space: The recipe.
        home: Where models are kept.
        gpu: Accelerators, `4x A100-40GB`; None is this machine.
        cluster: A `ray up` or KubeRay file whose accelerators are meant.
        price: Dollars an hour of one device.
        host_memory: Of the host for each GPU, `256GB`; None is a usual one.

    Raises:
        ConfigError: The hardware is not understood.
    """
    from graft.runtime.samplers import budget_warning, choose_sampler

    sections, chosen = space.sections(), choose_sampler(space)
    spending = read_spending(home / "studies" / sections.name, sections.search)
    target = find_target(gpu, cluster, space.example(), host_memory)
    kinds = [_kind(space, choices) for choices in _branches(space)]
    planned, unknown = None, ""
    try:
        shape = _shape(space.example(), home)
        cap = _cap(shape, target)
        kinds = [_measured(space, kind, cap, target) for kind in kinds]
        planned = _time(kinds, shape, target, space, home, price)
    except GraftError as error:
        unknown = str(error)
    if planned is None and not unknown:
        unknown = f"nothing is known of the speed of {target.name}; name it with --gpu"
    return Plan(
        name=sections.name,
        trials=1 if space.is_complete else sections.search.trials,
        num_combinations=space.num_combinations,
        objectives=tuple(f"{o.mode} {o.metric}" for o in sections.search.objectives),
        scheduler=sections.search.scheduler.type,
        sampler=f"{chosen.name}: {chosen.reason}",
        warning="" if space.is_complete else budget_warning(space) or "",
        spending=None if space.is_complete else spending,
        parameters=tuple(
            PlannedParameter(
                name=name,
                space=describe_space(known),
                opened_by={k: str(v) for k, v in space.opened_by(name).items()},
            )
            for name, known in space.holes.items()
        ),
        branches=tuple(kind.branch for kind in kinds),
        compatibility=method_support(),
        hardware=target.name,
        time=planned,
        unknown=unknown,
    )


def _shape(recipe: Recipe, home: Path) -> ModelShape:
    from graft.engine.memory.shape import ModelShape
    from graft.models import find_config

    return ModelShape.of(find_config(recipe.model, home))


def _cap(shape: ModelShape, target: Target) -> MemoryCap:
    from graft.engine.memory.cap import MemoryCap

    return MemoryCap(shape, target.limits)


def _branches(space: RecipeSpace) -> list[dict[str, Any]]:
    """Every combination of the choices that decide where a trial runs, up to a limit."""
    found: list[dict[str, Any]] = [{}]
    for name, known in space.holes.items():
        decides = name == "method" or name.startswith("scale")
        if not decides or not isinstance(known, Choice):
            continue
        opened_by = space.opened_by(name)
        found = [
            {**choices, name: value}
            for choices in found
            for value in known.values
            if opened_by.items() <= choices.items()
        ] + [choices for choices in found if not opened_by.items() <= choices.items()]
    return found[:_MAX_BRANCHES]


class _Kind(NamedTuple):
    choices: dict[str, Any]
    branch: PlannedBranch
    recipe: Recipe | None
    """The middle of the branch; None where it is refused."""


def _kind(space: RecipeSpace, choices: dict[str, Any]) -> _Kind:
    from graft.runtime.searcher import executor_of

    labels = {name: str(value) for name, value in choices.items()}
    try:
        recipe = space.sample(lambda name, known: choices.get(name, middle(known)))
        executor = executor_of(recipe, space.example())
    except ConfigError as error:
        refused = PlannedBranch(choices=labels, method="", executor="refused", reason=str(error))
        return _Kind(choices, refused, None)
    method = recipe.method.type
    runs = PlannedBranch(choices=labels, method=method, executor=executor, reason="")
    return _Kind(choices, runs, recipe)


def _measured(space: RecipeSpace, kind: _Kind, cap: MemoryCap, target: Target) -> _Kind:
    """Adds the memory, or refuses what never fits."""
    branch = kind.branch
    if kind.recipe is None:
        return kind
    workers = kind.recipe.scale.min_workers
    if target.is_named and workers > target.devices:
        words = (
            f"it needs {workers} workers with a device each, and {target.name} has "
            f"{target.devices}: set scale.workers to at most {target.devices}"
        )
        refused = branch.model_copy(update={"executor": "refused", "reason": words})
        return kind._replace(branch=refused, recipe=None)
    try:
        memory = plan_memory(
            space, kind.choices, cap, devices=target.devices, packs=branch.executor == "packed"
        )
    except ConfigError as error:
        refused = branch.model_copy(update={"executor": "refused", "reason": str(error)})
        return kind._replace(branch=refused, recipe=None)
    return kind._replace(branch=branch.model_copy(update={"memory": memory}))


def _time(
    kinds: list[_Kind],
    shape: ModelShape,
    target: Target,
    space: RecipeSpace,
    home: Path,
    price: float | None,
) -> PlannedTime | None:
    """The middle of each kind stands for its trials."""
    recipes = [kind.recipe for kind in kinds if kind.recipe]
    if target.speed is None or not recipes:
        return None
    alone = [kind.recipe for kind in kinds if kind.recipe and kind.branch.executor == "dedicated"]
    # Packs take a device each; dedicated trials share all of them out.
    most = max((recipe.scale.max_workers for recipe in alone), default=1)
    most = min(most, target.devices) if target.is_named else most
    devices = min(target.devices // most, recipes[0].search.trials) * most
    if space.is_complete:
        trials = recipes[0].search.model_copy(update={"trials": 1, "finalists": 0})
        recipes = [recipes[0].model_copy(update={"search": trials})]
        workers = recipes[0].scale.max_workers
        devices = min(workers, target.devices) if target.is_named else workers
    tokens = [_row_tokens(recipe, home) for recipe in recipes]
    return plan_time(
        recipes, shape, target.speed, row_tokens=tokens, devices=max(1, devices), price=price
    )


def _row_tokens(recipe: Recipe, home: Path) -> float:
    """Mean tokens of a training row where tokenizer and rows are at hand, else the most.

    Of a row whose answers are sampled it is the prompt that counts.
    """
    from graft.engine.memory.workload import Workload

    try:
        rows = training_rows(recipe, home)
    except (GraftError, OSError):
        return float(Workload.bound(recipe).row_tokens)
    samples = isinstance(recipe.objective, SamplingObjective)
    tokens = [len(r.asked.prompt_ids if samples and r.asked else r.input_ids) for r in rows]
    return sum(tokens) / max(1, len(tokens))
