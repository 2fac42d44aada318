"""Writes `recipe.md` from the recipe's own classes: `python docs/recipe_reference.py`."""

from __future__ import annotations

import inspect
import types
import typing
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from graft.compressors.base import COMPRESSORS
from graft.core.registry import Registry
from graft.detectors.base import DETECTORS
from graft.methods.base import METHODS
from graft.metrics.base import METRICS
from graft.objectives.base import OBJECTIVES
from graft.recipe.sections import Recipe

PAGE = Path(__file__).with_name("recipe.md")

HEAD = """# The recipe

Written by `python docs/recipe_reference.py` from the code; a test keeps it fresh. `model` and
`data`
are required; everything else has the default shown. Any value may be a hole (`{choice: [...]}`,
`{log: [lo, hi]}`, `{uniform: [lo, hi]}`, `{int: [lo, hi]}`), and a choice may be between whole
sections. `graft schema` prints the same as JSON Schema for editors.
"""


def kind(annotation: Any) -> str:
    """A type in words."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return kind(args[0])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(kind(arg) for arg in args if arg is not type(None))
    if origin in (tuple, list):
        return f"list of {kind(args[0])}" if args else "list"
    if origin is dict:
        return "mapping"
    if inspect.isclass(annotation):
        if issubclass(annotation, BaseModel):
            return "a section, see below"
        names = {str: "text", int: "whole number", float: "number", bool: "true or false"}
        return names.get(annotation, annotation.__name__)
    return "any"


def bounds(field: FieldInfo) -> str:
    """The range of a field, `1 to 8`, `above 0`."""
    words = {"ge": "from {}", "gt": "above {}", "le": "to {}", "lt": "below {}"}
    parts = [
        text.format(value)
        for item in field.metadata
        for name, text in words.items()
        if (value := getattr(item, name, None)) is not None
    ]
    return f" ({', '.join(parts)})" if parts else ""


def default_of(field: FieldInfo) -> str:
    """The default as it would be written."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is PydanticUndefined or value is None:
        return ""
    if isinstance(value, BaseModel):
        return ""
    if isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
        return "`" + ", ".join(str(item.model_dump()) for item in value) + "`"
    shown = list(value) if isinstance(value, tuple) else value
    return f"`{str(shown).lower() if isinstance(shown, bool) else shown}`"


def table(model: type[BaseModel]) -> str:
    """All fields of one section."""
    rows = ["| key | what it takes | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in model.model_fields.items():
        takes = f"{kind(field.annotation)}{bounds(field)}".replace("|", "or")
        meaning = " ".join((field.description or "").split()).replace("|", "or")
        rows.append(f"| `{name}` | {takes} | {default_of(field)} | {meaning} |")
    return "\n".join(rows)


def first_line(model: type[BaseModel]) -> str:
    """What a class says of itself."""
    return (inspect.getdoc(model) or "").partition("\n")[0]


def sections() -> list[tuple[str, type[BaseModel]]]:
    """Every section of the recipe by its path, those inside others after them."""
    found: list[tuple[str, type[BaseModel]]] = []

    def walk(path: str, model: type[BaseModel]) -> None:
        found.append((path, model))
        for name, field in model.model_fields.items():
            for inner in inner_sections(field.annotation):
                walk(f"{path}.{name}".lstrip("."), inner)

    walk("", Recipe)
    return found


def inner_sections(annotation: Any) -> list[type[BaseModel]]:
    """Section classes inside an annotation; families are listed apart."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return [] if inspect.isabstract(annotation) else [annotation]
    return [model for arg in typing.get_args(annotation) for model in inner_sections(arg)]


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for path, model in sections():
        parts.append(f"## `{path}`" if path else "## Top level")
        parts += [first_line(model), table(model)]
    families: dict[str, Registry[Any]] = {
        "method": METHODS,
        "objective": OBJECTIVES,
        "compress": COMPRESSORS,
        "watch.detectors": DETECTORS,
        "eval.metrics": METRICS,
    }
    for path, registry in families.items():
        inner: dict[str, type[BaseModel]] = {}
        for name in registry.names():
            model = registry.get(name)
            parts += [f"## `{path}`: `{{type: {name}}}`", first_line(model), table(model)]
            for key, field in model.model_fields.items():
                inner |= {f"{path}.{key}": found for found in inner_sections(field.annotation)}
        for place, model in inner.items():
            parts += [f"## `{place}`", first_line(model), table(model)]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
