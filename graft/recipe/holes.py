"""Holes: the places of a recipe that a search fills, and the walk that fills them in a fixed order.

A parsed section is a tree of dicts, lists, scalars and `Hole`s. Filling walks it from the top; a
hole that is a choice between sections opens only the holes of the section that was chosen, so the
space is conditional without a word about it. A parameter's name is its path, with every choice
between sections on the way in brackets: `train/lr`, `method[lora]/r`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from graft.core.spaces import Choice, Float, Int, Space
from graft.recipe.tree import FieldPath, describe

Suggest = Callable[[str, Space], Any]

KINDS = ("choice", "log", "uniform", "int")
SECTIONS_WITH_HOLES = ("method", "objective", "train", "scale")


@dataclass(frozen=True)
class Hole:
    """One place to fill."""

    space: Space
    """A range, or a choice between plain values or between the labels of `options`."""
    options: dict[Any, Any]
    """Choice label → parsed value; empty for a range."""
    index: dict[Any, int]
    """Choice label → position in the file."""

    @property
    def is_between_sections(self) -> bool:
        """Tells whether the options are labelled sections or lists rather than plain values."""
        return any(isinstance(option, dict | list) for option in self.options.values())


@dataclass(frozen=True)
class Elsewhere:
    """A key inside a method whose value belongs to another section, as `train.lr` may."""

    path: FieldPath


@dataclass(frozen=True)
class Problem:
    """Something wrong at one place of the recipe, in words."""

    path: FieldPath
    message: str


def is_hole(raw: Any) -> bool:
    """Tells whether a raw value is written as a hole."""
    return isinstance(raw, dict) and any(kind in raw for kind in KINDS)


def parse_holes(raw: Any, path: FieldPath, problems: list[Problem]) -> Any:
    """Returns the raw tree with each hole parsed; what is wrong with one is added to `problems`."""
    if is_hole(raw):
        if len(raw) != 1:
            problems.append(
                Problem(path, f"a hole has one key of {', '.join(KINDS)}, not {', '.join(raw)}")
            )
            return None
        ((kind, content),) = raw.items()
        if kind == "choice":
            return _parse_choice(content, path, problems)
        return _parse_range(kind, content, path, problems)
    if isinstance(raw, dict):
        return {key: parse_holes(value, (*path, key), problems) for key, value in raw.items()}
    if isinstance(raw, list):
        return [parse_holes(value, (*path, index), problems) for index, value in enumerate(raw)]
    return raw


def make_hole(space: Space) -> Hole:
    """Makes a hole of a method's own vetted range; its values are plain."""
    values = space.values if isinstance(space, Choice) else ()
    return Hole(space, {v: v for v in values}, {v: i for i, v in enumerate(values)})


def _parse_choice(content: Any, path: FieldPath, problems: list[Problem]) -> Any:
    if not isinstance(content, list) or not content:
        problems.append(Problem(path, "a choice is a list of two or more values"))
        return None
    if len(content) == 1:
        problems.append(
            Problem(path, f"a choice of one value is none; write {describe(content[0])} itself")
        )
        return None
    if any(is_hole(option) for option in content):
        problems.append(
            Problem(path, "an option of a choice may not be a hole itself; merge the two")
        )
        return None
    for index, option in enumerate(content):
        if option in content[:index]:
            message = f"the choice holds {describe(option)} twice; keep one"
            problems.append(Problem((*path, "choice", index), message))
            return None
    labels = _labels(content)
    parsed = [parse_holes(o, (*path, "choice", i), problems) for i, o in enumerate(content)]
    return Hole(
        Choice(values=tuple(labels)),
        dict(zip(labels, parsed, strict=True)),
        {label: index for index, label in enumerate(labels)},
    )


def _labels(options: list[Any]) -> list[Any]:
    """Names each option by its plain value, its `type`, or its own text."""
    if not any(isinstance(option, dict | list) for option in options):
        return options
    names = [
        str(option["type"])
        if isinstance(option, dict) and "type" in option
        else option
        if isinstance(option, str)
        else json.dumps(option)
        for option in options
    ]
    return [
        f"{name}#{names[: i + 1].count(name)}" if names.count(name) > 1 else name
        for i, name in enumerate(names)
    ]


def _parse_range(kind: str, content: Any, path: FieldPath, problems: list[Problem]) -> Any:
    is_pair = isinstance(content, list) and len(content) == 2
    if not is_pair or any(isinstance(x, bool) or not isinstance(x, int | float) for x in content):
        problems.append(Problem(path, f"`{kind}` takes two numbers, [low, high]; not {content!r}"))
        return None
    low, high = content
    try:
        if kind == "int":
            return Hole(Int(low=low, high=high), {}, {})
        return Hole(Float(low=low, high=high, log=kind == "log"), {}, {})
    except ValidationError as error:
        for detail in error.errors():
            message = detail["msg"].removeprefix("Value error, ")
            if detail["type"] in {"int_type", "int_from_float"}:
                message = f"`int` takes two whole numbers, not {content!r}"
            problems.append(Problem(path, message))
        return None


def fill(node: Any, suggest: Suggest) -> dict[str, Any]:
    """Returns the raw recipe with every open hole filled by `suggest`."""
    elsewhere: dict[FieldPath, Any] = {}
    filled: dict[str, Any] = _fill(node, "", suggest, elsewhere)
    for path, value in elsewhere.items():
        target = filled
        for part in path[:-1]:
            target = target.setdefault(str(part), {})
        target[str(path[-1])] = value
    return filled


def _fill(node: Any, name: str, suggest: Suggest, elsewhere: dict[FieldPath, Any]) -> Any:
    if isinstance(node, Hole):
        value = suggest(name, node.space)
        if not node.options:
            return value
        if value not in node.options:
            raise KeyError(name)
        branch = f"{name}[{value}]" if node.is_between_sections else name
        return _fill(node.options[value], branch, suggest, elsewhere)
    if isinstance(node, list):
        return [_fill(v, _join(name, str(i)), suggest, elsewhere) for i, v in enumerate(node)]
    if not isinstance(node, dict):
        return node
    filled: dict[str, Any] = {}
    for key, child in node.items():
        if isinstance(key, Elsewhere):
            path = ".".join(map(str, key.path))
            elsewhere[key.path] = _fill(child, _join(name, path), suggest, elsewhere)
        else:
            filled[key] = _fill(child, _join(name, key), suggest, elsewhere)
    return filled


def _join(name: str, part: str) -> str:
    return f"{name}/{part}" if name else part


@dataclass(frozen=True)
class NamedHole:
    """A hole with its parameter name and the choices that open it."""

    name: str
    path: FieldPath
    """Of what it fills, in the filled recipe."""
    hole: Hole
    opened_by: dict[str, Any]
    """Parameter name → label, for every choice on the way."""


def iterate_holes(
    node: Any, name: str = "", path: FieldPath = (), opened_by: dict[str, Any] | None = None
) -> Iterator[NamedHole]:
    """Yields every hole of every branch, in the order in which filling meets them."""
    opened_by = opened_by or {}
    if isinstance(node, Hole):
        yield NamedHole(name, path, node, opened_by)
        for label, option in node.options.items():
            yield from iterate_holes(option, f"{name}[{label}]", path, {**opened_by, name: label})
    elif isinstance(node, list):
        for index, child in enumerate(node):
            yield from iterate_holes(child, _join(name, str(index)), (*path, index), opened_by)
    elif isinstance(node, dict):
        for key, child in node.items():
            part = ".".join(map(str, key.path)) if isinstance(key, Elsewhere) else key
            place = key.path if isinstance(key, Elsewhere) else (*path, key)
            yield from iterate_holes(child, _join(name, part), place, opened_by)


def locate(root: Any, path: FieldPath, chosen: dict[str, Any]) -> FieldPath:
    """Translates a path of the filled recipe into the place in the file that it came from.

    Args:
        root: The parsed recipe.
        path: `("method", "r")`.
        chosen: Parameter name → value of the filling.

    Returns:
        `("method", "choice", 0, "r")`, or as much of it as the file holds.
    """
    node, name, parts = root, "", list(path)
    found: list[str | int] = []
    while True:
        if isinstance(node, Hole):
            value = chosen.get(name)
            if value not in node.options:
                return tuple(found)
            found += ["choice", node.index[value]]
            name = f"{name}[{value}]" if node.is_between_sections else name
            node = node.options[value]
            continue
        if not parts:
            return tuple(found)
        part = parts.pop(0)
        try:
            node = node[part]
        except (KeyError, IndexError, TypeError):
            return (*found, part, *parts)
        found.append(part)
        name = _join(name, str(part))


def middle(space: Space) -> Any:
    """Returns a choice's first value, or the geometric or arithmetic middle of a range."""
    if isinstance(space, Choice):
        return space.values[0]
    if isinstance(space, Int):
        return (space.low + space.high) // 2
    if space.log:
        return math.sqrt(space.low * space.high)
    return (space.low + space.high) / 2


def edges(space: Space) -> tuple[Any, ...]:
    """Returns a choice's values, or both ends of a range."""
    return tuple(space.values) if isinstance(space, Choice) else (space.low, space.high)


def contains(space: Space, value: Any) -> bool:
    """Tells whether a value lies in a space."""
    if isinstance(space, Choice):
        return any(value == known and type(value) is type(known) for known in space.values)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if isinstance(space, Int) and not isinstance(value, int):
        return False
    return space.low <= value <= space.high
