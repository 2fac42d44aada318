"""A recipe with holes: what may vary, and a complete, validated recipe for any filling."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

from pydantic import ValidationError

from graft.core.errors import ConfigError
from graft.core.registry import nearest
from graft.core.spaces import Choice, Int, Space
from graft.data.section import DataSection
from graft.models.section import ModelSection
from graft.recipe.checking import (
    check_version,
    is_under_any,
    lasting_problems,
    parse_sections,
    try_fillings,
)
from graft.recipe.costs import LATENCY_MS
from graft.recipe.holes import (
    SECTIONS_WITH_HOLES,
    Elsewhere,
    Hole,
    NamedHole,
    Problem,
    Suggest,
    contains,
    edges,
    fill,
    iterate_holes,
    middle,
)
from graft.recipe.mixture import DataMixture
from graft.recipe.operation import LoopSection, ServeSection, TrackSection, WatchSection
from graft.recipe.problems import explain, report
from graft.recipe.search import SearchSection
from graft.recipe.sections import (
    AnyCompressor,
    CompareSection,
    EvalSection,
    Recipe,
    ScaleSection,
    VerifySection,
)
from graft.recipe.tree import FieldPath, Tree, dotted
from graft.recipe.vetted import add_vetted_space, wants_vetted_space


class Sections(NamedTuple):
    """The sections that are the same for every filling."""

    name: str
    model: ModelSection
    data: DataSection | DataMixture
    search: SearchSection
    compare: CompareSection
    eval: EvalSection
    compress: tuple[AnyCompressor, ...]
    verify: VerifySection
    serve: ServeSection
    watch: WatchSection
    loop: LoopSection
    track: TrackSection


class RecipeSpace:
    """A recipe as written. Every option of every choice and both ends of every range are valid.

    A combination of options may still be refused (two settings that exclude each other); `sample`
    and `fix` then raise, and a search proposes another.
    """

    def __init__(self, tree: Tree) -> None:
        """Parses and checks a tree.

        Raises:
            ConfigError: All problems of the file at once.
        """
        self._raw: dict[str, Any] = tree.root
        check_version(tree)
        problems: list[Problem] = []
        self._parsed = parse_sections(tree.root, problems)
        if wants_vetted_space(tree.root):
            add_vetted_space(self._parsed)
        self._holes = {hole.name: hole for hole in iterate_holes(self._parsed)}
        fillings = try_fillings(self._parsed, self._holes)
        broken = [_of_hole(problem.path) for problem in problems]
        lasting = lasting_problems(self._parsed, fillings)
        problems += [problem for problem in lasting if not is_under_any(problem.path, broken)]
        if problems:
            raise report(problems, tree)
        self._examples = tuple(filling.recipe for filling in fillings if filling.recipe)
        self._example = self._examples[0]
        if missing := self._missing_held_out_rows():
            raise report([missing], tree)
        self._points = self._read_points(tree)

    @property
    def holes(self) -> dict[str, Space]:
        """Parameter name → its space, over all branches; choices between sections are labels."""
        return {name: hole.hole.space for name, hole in self._holes.items()}

    @property
    def is_complete(self) -> bool:
        """Tells whether no hole is left."""
        return not self._holes

    @property
    def num_combinations(self) -> int | None:
        """How many different recipes there are, or None where a range makes them uncountable."""
        return _count(self._parsed)

    def opened_by(self, name: str) -> dict[str, Any]:
        """Returns the choices that must be made, name → label, before this parameter exists."""
        return dict(self._holes[name].opened_by)

    def recipe(self) -> Recipe:
        """Returns the recipe of a space without holes.

        Raises:
            ConfigError: Holes are left; the message names them.
        """
        if self._holes:
            raise ConfigError(
                f"the recipe leaves {len(self._holes)} settings open: {', '.join(self._holes)}; "
                "`graft tune` searches them, or fix each one with --set"
            )
        return self._example

    def sample(self, suggest: Suggest) -> Recipe:
        """Fills the holes, top down; only the holes of chosen branches are asked for.

        Args:
            suggest: Called as `suggest(name, space)`; returns a value of the space.

        Raises:
            ConfigError: A suggested value is not in its space, or this combination is refused.
        """
        params: dict[str, Any] = {}

        def checked(name: str, space: Space) -> Any:
            value = suggest(name, space)
            if not contains(space, value):
                raise ConfigError(f"{name}: {value!r} is not in {describe_space(space)}")
            params[name] = value
            return value

        raw = fill(self._parsed, checked)
        try:
            return Recipe.model_validate(raw)
        except ValidationError as error:
            words = "; ".join(f"{dotted(p.path)}: {p.message}" for p in explain(error, raw))
            raise ConfigError(f"the combination {params} is refused: {words}") from error

    def fix(self, params: dict[str, Any]) -> Recipe:
        """Rebuilds the recipe of recorded parameters.

        Raises:
            ConfigError: A parameter is unknown, absent or outside its space, or the combination
                is refused.
        """
        for name in params:
            if name not in self._holes:
                near = nearest(name, list(self._holes))
                raise ConfigError(
                    f"{name} is not a parameter of this recipe.{near} "
                    f"Known: {', '.join(self._holes) or 'none'}"
                )

        def recorded(name: str, space: Space) -> Any:
            if name not in params:
                raise ConfigError(f"no value for {name}, which may be {describe_space(space)}")
            return params[name]

        return self.sample(recorded)

    def example(self) -> Recipe:
        """Returns one valid filling, for what is the same in all."""
        return self._example

    def examples(self) -> tuple[Recipe, ...]:
        """Returns valid fillings in which every option and both ends of every range stand once.

        An option that is refused beside the middles of the other holes is in none.
        """
        return self._examples

    def scales(self) -> Iterator[ScaleSection]:
        """Yields the scale section of every combination of its options, and of ends of its ranges.

        It is judged by itself: what another section refuses beside it is among them.
        """
        parsed = {"scale": self._parsed.get("scale", {})}
        holes = {hole.name: hole.hole.space for hole in iterate_holes(parsed)}
        for values in itertools.product(*map(edges, holes.values())):
            raw = _filled(parsed, dict(zip(holes, values, strict=True)))
            with suppress(ValidationError):
                yield ScaleSection.model_validate(raw["scale"])

    def default(self) -> Recipe:
        """Returns the recipe of first choices and middles of ranges (geometric for `log`).

        Raises:
            ConfigError: That combination is refused.
        """
        return self.sample(lambda name, space: middle(space))

    def params_of(self, recipe: Recipe) -> dict[str, Any]:
        """Returns the parameters that a recipe stands for, to start a search from it.

        Only a value that lies in its space is in the result.
        """
        content = Tree("", recipe.model_dump(mode="json"))
        candidates: list[dict[str, Any]] = [{}]
        for hole in self._holes.values():
            candidates = [more for known in candidates for more in _extended(known, hole, content)]
        return next((c for c in candidates if self._gives(c, recipe)), candidates[0])

    def _gives(self, params: dict[str, Any], recipe: Recipe) -> bool:
        try:
            rebuilt = self.fix(params)
        except ConfigError:
            return False
        return all(getattr(rebuilt, key) == getattr(recipe, key) for key in SECTIONS_WITH_HOLES)

    def points(self) -> list[dict[str, Any]]:
        """Returns `search.points` as parameters; what a point leaves out is for the sampler."""
        return copy.deepcopy(self._points)

    def sections(self) -> Sections:
        """Returns the sections that no hole may stand in."""
        return Sections(*(getattr(self._example, name) for name in Sections._fields))

    def content(self) -> dict[str, Any]:
        """Returns the recipe as plain values, overrides and absolute paths in, holes as written."""
        return copy.deepcopy(self._raw)

    def _missing_held_out_rows(self) -> Problem | None:
        metrics = [objective.metric for objective in self._example.search.objectives]
        if self.is_complete or self._example.data.eval is not None:
            return None
        if not any(metric.startswith("eval/") or metric == LATENCY_MS for metric in metrics):
            return None
        return Problem(
            ("data",),
            f"the search is for {', '.join(metrics)}, measured on held-out rows; add data.eval",
        )

    def _read_points(self, tree: Tree) -> list[dict[str, Any]]:
        points: list[dict[str, Any]] = []
        if self.is_complete:  # one of the recipes of a search: its points are history
            return points
        problems: list[Problem] = []
        for index, point in enumerate(self._example.search.points):
            path = ("search", "points", index)
            points.append(params := {})
            for given, value in point.items():
                name = given.replace(".", "/") if given not in self._holes else given
                hole = self._holes.get(name)
                if hole is None:
                    near = nearest(name, list(self._holes))
                    problems.append(Problem((*path, given), f"is not an open setting.{near}"))
                elif not contains(hole.hole.space, value):
                    words = f"{value!r} is not in {describe_space(hole.hole.space)}"
                    problems.append(Problem((*path, given), words))
                else:
                    params[name] = value
        if problems:
            raise report(problems, tree)
        return points


def describe_space(space: Space) -> str:
    """Formats a space as a recipe would write it."""
    if isinstance(space, Choice):
        return f"choice [{', '.join(map(str, space.values))}]"
    if isinstance(space, Int):
        return f"int [{space.low}, {space.high}]"
    return f"{'log' if space.log else 'uniform'} [{space.low:g}, {space.high:g}]"


def _filled(parsed: Any, params: dict[str, Any]) -> dict[str, Any]:
    return fill(parsed, lambda name, _: params[name])


def _of_hole(path: FieldPath) -> FieldPath:
    return path[:-2] if path[-2:-1] == ("choice",) else path


def _extended(known: dict[str, Any], hole: NamedHole, content: Tree) -> list[dict[str, Any]]:
    """Adds to parameters what the resolved recipe may mean for one more hole."""
    if any(known.get(name) != label for name, label in hole.opened_by.items()):
        return [known]
    try:
        value = content.get(hole.path)
    except KeyError:
        return [known]
    return [{**known, hole.name: meaning} for meaning in _meanings(value, hole.hole)] or [known]


def _meanings(value: Any, hole: Hole) -> list[Any]:
    if not isinstance(hole.space, Choice):
        return [value] if contains(hole.space, value) else []
    return [label for label, option in hole.options.items() if _agrees(option, value)]


def _agrees(option: Any, value: Any) -> bool:
    """Tells whether everything that an option states stands in the resolved value too."""
    if isinstance(option, Hole):
        return bool(_meanings(value, option))
    if isinstance(option, dict):
        return isinstance(value, dict) and all(
            key in value and _agrees(child, value[key])
            for key, child in option.items()
            if not isinstance(key, Elsewhere)
        )
    if isinstance(option, str) and isinstance(value, dict):
        return bool(value.get("type") == option)
    return bool(option == value)


def _count(node: Any) -> int | None:
    if isinstance(node, Hole):
        if not node.options:
            space = node.space
            return space.high - space.low + 1 if isinstance(space, Int) else None
        counts = [_count(option) for option in node.options.values()]
        return None if None in counts else sum(filter(None, counts))
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    product = 1
    for child in children:
        count = _count(child)
        if count is None:
            return None
        product *= count
    return product
