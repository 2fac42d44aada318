"""From a file to a recipe and back."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from graft.core.files import write_atomic
from graft.recipe.overrides import apply_override
from graft.recipe.sections import Recipe
from graft.recipe.space import RecipeSpace
from graft.recipe.tree import FieldPath, Tree, read_tree

RESOLVED_NAME = "recipe.yaml"

_DATA_PATHS: tuple[FieldPath, ...] = (
    ("data", "train"),
    ("data", "eval"),
    ("compare", "general"),
    ("loop", "feedback"),
    ("loop", "feedback_eval"),
)
_FOLDER_OR_NAME: tuple[FieldPath, ...] = (("model", "source"), ("train", "init_from"))


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> RecipeSpace:
    """Reads, overrides and checks a recipe.

    Relative data files and local model folders are resolved against the recipe's folder; those
    given with an override, against the current one.

    Args:
        path: The YAML file.
        overrides: `a.b=value` each, the value read as YAML; later ones win.

    Raises:
        ConfigError: What is wrong with the file, each problem with line, field, value and fix.
    """
    path = Path(path).expanduser()
    tree = read_tree(path)
    defaults = {
        name: dict(default)
        for name, field in Recipe.model_fields.items()
        if isinstance(default := field.default, dict)
    }
    for override in overrides:
        apply_override(tree, override, defaults)
    _resolve_paths(tree, path.absolute().parent)
    return RecipeSpace(tree)


def write_resolved(recipe: Recipe, folder: Path) -> Path:
    """Saves a complete recipe, defaults spelled out, as `recipe.yaml` in a folder."""
    file = folder / RESOLVED_NAME
    write_atomic(file, to_yaml(recipe.model_dump(mode="json")))
    return file


def to_yaml(content: dict[str, Any]) -> str:
    """Formats plain values as YAML."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 100
    stream = io.StringIO()
    yaml.dump(content, stream)
    return stream.getvalue()


def _resolve_paths(tree: Tree, folder: Path) -> None:
    sources = _at(tree, ("data", "sources"))
    count = len(sources) if isinstance(sources, list) else 0
    mixed = [("data", "sources", at, key) for at in range(count) for key in ("train", "eval")]
    data_paths = (*_DATA_PATHS, *mixed)
    for path in (*data_paths, *_FOLDER_OR_NAME):
        section, value = _at(tree, path[:-1]), _at(tree, path)
        if not isinstance(value, str) or not value:
            continue
        base = Path.cwd() if tree.origin(path).startswith("--set") else folder
        section[path[-1]] = _resolved(value, base, is_data=path in data_paths)


def _at(tree: Tree, path: FieldPath) -> Any:
    try:
        return tree.get(path)
    except KeyError:
        return None


def _resolved(value: str, base: Path, *, is_data: bool) -> str:
    """Makes a file name absolute; hub ids, wheels and digests stay as they are."""
    if value.startswith(("hub:", "wheel:")) or "://" in value:
        return value
    local = base / Path(value).expanduser()
    looks_local = value.startswith((".", "/", "~")) or value.endswith(".gguf")
    if is_data or looks_local or local.exists():
        return str(local.resolve()) if local.exists() else str(local)
    return value
