"""`--set a.b=value`: one field of a recipe from the command line."""

from __future__ import annotations

import copy
import re
from typing import Any

from graft.core.errors import ConfigError
from graft.core.passwords import mask_passwords
from graft.recipe.tree import FieldPath, Tree, describe, dotted, read_value

_BRANCH = re.compile(r"\[[^]]*\]")
"""The branch in a parameter's name, `method[lora]/r`."""


def apply_override(tree: Tree, text: str, sections: dict[str, Any]) -> None:
    """Sets one field of a tree from `a.b=value`; the value is read as YAML.

    A setting that it closes leaves `search.points`, and with it the points of another value.

    Args:
        tree: Changed in place.
        text: As given with `--set`.
        sections: Sections that a recipe may leave out → the mapping that stands for their default.

    Raises:
        ConfigError: There is no `=`, a part of the path is empty, or it leads through a scalar.
    """
    label = f"--set {mask_passwords(text)}"
    name, equals, value_text = text.partition("=")
    parts = name.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"{label}: expected PATH=VALUE, as in --set method.r=16")
    if len(parts) > 1 and parts[0] not in tree.root and parts[0] in sections:
        tree.root[parts[0]] = copy.deepcopy(sections[parts[0]])
    path: FieldPath = ()
    node = tree.root
    for part in parts[:-1]:
        key = _key(node, part, path, label)
        path = (*path, key)
        node = _descend(node, key, path, label)
        tree.origins.setdefault(path, label)
    key = _key(node, parts[-1], path, label)
    node[key] = read_value(value_text, label)
    path = (*path, key)
    for known in [known for known in tree.origins if known[: len(path)] == path]:
        del tree.origins[known]
    tree.origins[path] = label
    if not isinstance(node[key], dict):
        _close_in_points(tree, dotted(path), node[key])


def _close_in_points(tree: Tree, name: str, value: Any) -> None:
    """Takes a setting that is fixed now out of `search.points`, and points of another value."""
    search = tree.root.get("search")
    points = search.get("points") if isinstance(search, dict) else None
    if not isinstance(points, list) or not all(isinstance(point, dict) for point in points):
        return
    kept = []
    for point in points:
        named = [key for key in point if _BRANCH.sub("", str(key)).replace("/", ".") == name]
        if all(point[key] == value for key in named):
            kept.append({key: given for key, given in point.items() if key not in named})
    if kept != points:
        search["points"] = [point for point in kept if point]
        places = [known for known in tree.origins if known[:2] == ("search", "points")]
        for known in places:
            if len(known) > 2:  # its line is another point's now
                del tree.origins[known]


def _key(node: Any, part: str, path: FieldPath, label: str) -> str | int:
    if isinstance(node, dict):
        return part
    if not part.isdecimal() or int(part) >= len(node):
        raise ConfigError(
            f"{label}: {dotted(path)} is a list of {len(node)}; "
            f"{part!r} must be one of its positions, from 0"
        )
    return int(part)


def _descend(node: Any, key: str | int, path: FieldPath, label: str) -> Any:
    """Goes one level down, where a mapping may be absent or a component given by its bare name."""
    if isinstance(node, dict) and node.get(str(key)) is None:
        node[key] = {}
    child = node[key]
    if isinstance(child, str):
        child = node[key] = {"type": child}
    if isinstance(child, dict) and len(child) == 1 and isinstance(child.get("choice"), list):
        raise ConfigError(
            f"{label}: {dotted(path)} is a choice; set the whole of it "
            f"(--set '{dotted(path)}={{...}}') or change the file"
        )
    if not isinstance(child, dict | list):
        raise ConfigError(f"{label}: {dotted(path)} is {describe(child)}; it has nothing inside")
    return child
