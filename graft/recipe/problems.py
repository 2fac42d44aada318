"""Validation errors in words: the field, what it holds, what it may hold, the nearest name."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from graft.compressors.base import COMPRESSORS, Compressor
from graft.core.errors import ConfigError
from graft.core.model import Variant
from graft.core.passwords import mask_passwords
from graft.core.registry import Registry, nearest
from graft.detectors.base import DETECTORS, Detector
from graft.methods.base import METHODS, Method
from graft.metrics.base import METRICS, Metric
from graft.objectives.base import OBJECTIVES, Objective
from graft.recipe.holes import Problem
from graft.recipe.sections import Recipe
from graft.recipe.tree import FieldPath, Tree, describe, dotted

FAMILIES: dict[type[Variant], Registry[Any]] = {
    Method: METHODS,
    Objective: OBJECTIVES,
    Compressor: COMPRESSORS,
    Detector: DETECTORS,
    Metric: METRICS,
}

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a section, that is a mapping of its keys",
    "model_attributes_type": "a section, that is a mapping of its keys",
    "none_required": "nothing",
}
_BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("above", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("below", "lt"),
}


def explain(error: ValidationError, raw: dict[str, Any]) -> list[Problem]:
    """Translates a pydantic error on a filled recipe into problems, one a field."""
    by_path: dict[FieldPath, list[Any]] = {}
    in_union: set[FieldPath] = set()
    for detail in error.errors(include_url=False):
        path = _real_path(detail["loc"], raw, is_absent=detail["type"] == "missing")
        by_path.setdefault(path, []).append(detail)
        if len(path) != len(detail["loc"]):
            in_union.add(path)
    deeper = {path[:-1] for path in in_union if path[:-1] in by_path}
    return [
        Problem(path, _message(path, details, raw))
        for path, details in by_path.items()
        if path not in deeper
    ]


def report(problems: list[Problem], tree: Tree) -> ConfigError:
    """Makes one error of all problems, in the order of the file."""
    lines = list(dict.fromkeys(_line(problem, tree) for problem in problems))
    lines.sort(key=_line_number)
    if len(lines) == 1:
        return ConfigError(lines[0])
    return ConfigError("\n  ".join([f"{tree.source}: {len(lines)} problems", *lines]))


def _line(problem: Problem, tree: Tree) -> str:
    shown = dotted(tuple(part for part in problem.path if part != "choice"))
    line = f"{tree.origin(problem.path)}: {shown}: {problem.message}".replace(": : ", ": ")
    return mask_passwords(line)


def _line_number(line: str) -> int:
    number = line.partition(": ")[0].rpartition(":")[2]
    return int(number) if number.isdecimal() else 0


def _real_path(loc: tuple[str | int, ...], raw: Any, *, is_absent: bool) -> FieldPath:
    """Drops what pydantic adds to a location (names of union members, discriminator values)."""
    path: list[str | int] = []
    node = raw
    for index, part in enumerate(loc):
        try:
            node = node[part]
        except (KeyError, IndexError, TypeError):
            if not (is_absent and index == len(loc) - 1):
                continue
        path.append(part)
    return tuple(path)


def _message(path: FieldPath, details: list[Any], raw: dict[str, Any]) -> str:
    first = details[0]
    kind, value = first["type"], first["input"]
    if kind == "extra_forbidden":
        return _unknown_key(path, raw)
    if kind == "missing":
        return "is required and absent"
    if kind == "value_error":
        return str(first["msg"]).removeprefix("Value error, ")
    if path == ("version",) and isinstance(value, int) and value > 1:
        return f"this recipe is of version {value}, this GRAFT reads version 1; upgrade GRAFT"
    if kind.startswith("union_tag"):
        return _unknown_tag(first)
    expected = list(dict.fromkeys(filter(None, map(_expected, details))))
    if not expected:
        return f"{first['msg']}, not {describe(value)}"
    return f"must be {' or '.join(expected)}, not {describe(value)}.{_hint(details, value)}".rstrip(
        "."
    )


def _expected(detail: Any) -> str | None:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in _BOUNDS:
        words, key = _BOUNDS[kind]
        return f"{words} {context[key]}"
    if kind == "literal_error":
        return str(context["expected"])
    if kind == "string_pattern_mismatch":
        return f"text of the form {context['pattern']}"
    return _EXPECTED.get(kind)


def _hint(details: list[Any], value: Any) -> str:
    if not isinstance(value, str):
        return ""
    literals = " ".join(
        detail["ctx"]["expected"] for detail in details if detail["type"] == "literal_error"
    )
    options = literals.replace(",", "").split()
    takes_number = any(detail["type"] in {"int_type", "float_type"} for detail in details)
    if takes_number or value in options:
        return " A number stands without quotes" if _is_number(value) else ""
    return nearest(value, [option.strip("'") for option in options])


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _unknown_tag(detail: Any) -> str:
    context = detail["ctx"]
    if "tag" not in context:
        return "needs a `type`"
    expected = str(context["expected_tags"])
    near = nearest(context["tag"], expected.replace("'", "").replace(",", "").split())
    return f"unknown type {context['tag']!r}.{near} Known: {expected.replace(chr(39), '')}"


def _unknown_key(path: FieldPath, raw: dict[str, Any]) -> str:
    key = str(path[-1])
    owner = model_at(path[:-1], raw)
    known = list(owner.model_fields) if owner else []
    initials = "".join(word[0] for word in key.split("_") if word)
    near = f" Did you mean {initials!r}?" if initials in known else nearest(key, known)
    if near:
        return f"unknown key.{near}"
    homes = [
        name
        for name, field in Recipe.model_fields.items()
        for model in [_model_of(field.annotation, raw.get(name))]
        if model and key in model.model_fields and (name,) != path[:-1]
    ]
    if homes:
        return f"unknown key here; it belongs in {' or '.join(homes)}"
    return f"unknown key. Known: {', '.join(known)}"


def model_at(path: FieldPath, raw: Any) -> type[BaseModel] | None:
    """Returns the settings class that owns the keys at `path`, or None where it cannot be told."""
    model: type[BaseModel] | None = Recipe
    annotation: Any = Recipe
    node = raw
    for part in path:
        try:
            node = node[part]
        except (KeyError, IndexError, TypeError):
            node = None
        if isinstance(part, int):
            model = _model_of(annotation, node)
            continue
        if model is None or part not in model.model_fields:
            return None
        annotation = model.model_fields[part].annotation
        model = _model_of(annotation, node)
    return model


def _model_of(annotation: Any, raw: Any) -> type[BaseModel] | None:
    """Picks the model that an annotation means for a value, by its `type` or else its keys."""
    keys = raw.keys() if isinstance(raw, dict) else set()
    models = sorted(_models_in(annotation), key=lambda m: -len(m.model_fields.keys() & keys))
    name = raw.get("type") if isinstance(raw, dict) else raw
    for model in models:
        if issubclass(model, Variant) and model in FAMILIES:
            registry = FAMILIES[model]
            return registry.get(name) if name in registry.names() else None
        if "type" in model.model_fields and len(models) > 1:
            if name in get_args(model.model_fields["type"].annotation):
                return model
        else:
            return model
    return None


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) is Annotated:
        yield from _models_in(get_args(annotation)[0])
    elif get_origin(annotation) in {tuple, Union, types.UnionType}:
        for argument in get_args(annotation):
            yield from _models_in(argument)
