"""`search: {space: auto}`: what the authors of each method and objective would search."""

from __future__ import annotations

from typing import Any

from graft.core.registry import Registry
from graft.methods.base import METHODS
from graft.objectives.base import OBJECTIVES
from graft.recipe.holes import Elsewhere, Hole, make_hole
from graft.recipe.sections import Recipe

_FAMILIES: dict[str, Registry[Any]] = {"method": METHODS, "objective": OBJECTIVES}


def wants_vetted_space(root: dict[str, Any]) -> bool:
    """Tells whether a raw recipe says `search: {space: auto}`."""
    search = root.get("search")
    return isinstance(search, dict) and search.get("space") == "auto"


def add_vetted_space(parsed: dict[str, Any]) -> None:
    """Opens what each method's and objective's own search space names and the recipe does not."""
    parsed.setdefault("method", Recipe.model_fields["method"].get_default()["type"])
    elsewhere: set[Elsewhere] = set()
    for section in [name for name in _FAMILIES if name in parsed]:
        found = parsed[section]
        if not isinstance(found, Hole):
            parsed[section] = _with_vetted_space(section, found, parsed, elsewhere)
            continue
        options = {
            label: _with_vetted_space(section, option, parsed, elsewhere, is_branch=True)
            for label, option in found.options.items()
        }
        parsed[section] = Hole(found.space, options, found.index)
        for option in options.values():
            if isinstance(option, dict):
                elsewhere |= {key for key in option if isinstance(key, Elsewhere)}


def _with_vetted_space(
    own: str,
    option: Any,
    parsed: dict[str, Any],
    taken: set[Elsewhere],
    *,
    is_branch: bool = False,
) -> Any:
    """Opens an option; what a branch of an earlier family opens elsewhere is `taken`."""
    registry = _FAMILIES[own]
    opened: dict[Any, Any] = {"type": option} if isinstance(option, str) else option
    if not isinstance(opened, dict) or opened.get("type") not in registry.names():
        return option
    opened = dict(opened)
    for name, space in registry.get(opened["type"]).search_space().items():
        section, key = name.split(".") if "." in name else (own, name)
        if section == own:
            opened.setdefault(key, make_hole(space))
            continue
        there = parsed.setdefault(section, {})
        is_free = Elsewhere((section, key)) not in taken
        if is_free and isinstance(there, dict) and key not in there:
            if is_branch:
                opened[Elsewhere((section, key))] = make_hole(space)
            else:
                there[key] = make_hole(space)
    return opened
