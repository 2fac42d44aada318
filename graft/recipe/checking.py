"""Checks a recipe with holes at load: every option, both ends of every range, in its branch."""

from __future__ import annotations

from typing import Any, NamedTuple

from pydantic import ValidationError

from graft.core.spaces import Space
from graft.recipe.holes import (
    SECTIONS_WITH_HOLES,
    NamedHole,
    Problem,
    edges,
    fill,
    is_hole,
    locate,
    middle,
    parse_holes,
)
from graft.recipe.problems import explain, report
from graft.recipe.sections import Recipe
from graft.recipe.tree import FieldPath, Tree


class Filling(NamedTuple):
    """One filling tried at load, and what validation says of it (places in the file)."""

    params: dict[str, Any]
    tested: NamedHole | None
    problems: list[Problem]
    """Paths in the filled recipe."""
    recipe: Recipe | None


def check_version(tree: Tree) -> None:
    """Refuses a recipe of a later version before its unknown keys are.

    Raises:
        ConfigError: The version is newer than this GRAFT.
    """
    version = tree.root.get("version", 1)
    if isinstance(version, int) and version > 1:
        message = f"this recipe is of version {version}, this GRAFT reads version 1; upgrade GRAFT"
        raise report([Problem(("version",), message)], tree)


def parse_sections(root: dict[str, Any], problems: list[Problem]) -> dict[str, Any]:
    """Parses the holes of the sections that may have them; any other hole is a problem."""
    parsed: dict[str, Any] = {}
    for key, value in root.items():
        if key in SECTIONS_WITH_HOLES:
            parsed[key] = parse_holes(value, (key,), problems)
        else:
            parsed[key] = value
            problems += [
                Problem(
                    path,
                    f"a hole may stand in {', '.join(SECTIONS_WITH_HOLES)} only; give one value",
                )
                for path in _hole_paths(value, (key,))
            ]
    return parsed


def _hole_paths(raw: Any, path: FieldPath) -> list[FieldPath]:
    if is_hole(raw):
        return [path]
    items: Any = raw.items() if isinstance(raw, dict) else ()
    if isinstance(raw, list):
        items = enumerate(raw)
    return [found for key, child in items for found in _hole_paths(child, (*path, key))]


def try_fillings(parsed: Any, holes: dict[str, NamedHole]) -> list[Filling]:
    """Validates a covering set of fillings."""
    return [_try(parsed, params, hole) for params, hole in _coverage(holes)]


def lasting_problems(parsed: Any, fillings: list[Filling]) -> list[Problem]:
    """Picks what is wrong by itself; what only a combination does is left to the search.

    A problem counts if it lies in the very value under test, or stands in every filling in
    which its place in the file is open.
    """
    placed = [
        {Problem(locate(parsed, p.path, f.params), p.message): p for p in f.problems}
        for f in fillings
    ]
    found: dict[FieldPath, Problem] = {}
    for filling, problems in zip(fillings, placed, strict=True):
        for there, here in problems.items():
            if there.path in found:
                continue
            is_tested = _is_tested_value(here.path, filling.tested)
            if is_tested or all(
                there in others or locate(parsed, here.path, other.params) != there.path
                for other, others in zip(fillings, placed, strict=True)
            ):
                found[there.path] = there
    if not found and all(filling.recipe is None for filling in fillings):
        return list(placed[0])
    return list(found.values())


def is_under_any(path: FieldPath, broken: list[FieldPath]) -> bool:
    """Tells whether a path lies at or under one of the known broken ones."""
    return any(path[: len(known)] == known for known in broken)


def _try(parsed: Any, params: dict[str, Any], tested: NamedHole | None) -> Filling:
    complete: dict[str, Any] = {}

    def suggest(name: str, space: Space) -> Any:
        complete[name] = params.get(name, middle(space))
        return complete[name]

    raw = fill(parsed, suggest)
    try:
        return Filling(complete, tested, [], Recipe.model_validate(raw))
    except ValidationError as error:
        return Filling(complete, tested, explain(error, raw), None)


def _coverage(holes: dict[str, NamedHole]) -> list[tuple[dict[str, Any], NamedHole | None]]:
    """Fillings such that every option and both ends of every range are tried once."""
    if not holes:
        return [({}, None)]
    fillings: list[tuple[dict[str, Any], NamedHole | None]] = []
    for hole in holes.values():
        values = edges(hole.hole.space)
        fillings += [({**hole.opened_by, hole.name: value}, hole) for value in values]
    return fillings


def _is_tested_value(path: FieldPath, tested: NamedHole | None) -> bool:
    if tested is None:
        return True
    return not tested.hole.is_between_sections and path[: len(tested.path)] == tested.path
