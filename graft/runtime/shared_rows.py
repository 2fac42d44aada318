"""Rows that the driver has prepared and proved, for every process of its cluster that trains.

They lie in Ray's object store, once on a node however many trials run there, and as long as the
driver lives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graft.data.prepare import PreparedData
    from graft.recipe.sections import Recipe

SharedRows = Mapping[str, Any]
"""An objective's `row_key` → Ray's reference to a `PreparedData`; it can be sent anywhere."""


def share_rows(prepared: Mapping[str, PreparedData]) -> SharedRows:
    """Puts prepared rows where the whole cluster can read them.

    Args:
        prepared: By the objective's `row_key`.
    """
    import ray

    return {key: ray.put(rows) for key, rows in prepared.items()}


def shared_rows(shared: SharedRows, recipe: Recipe) -> PreparedData | None:
    """Reads a recipe's rows; None where nobody has prepared them."""
    import ray

    reference = shared.get(recipe.objective.row_key)
    if reference is None:
        return None
    prepared: PreparedData = ray.get(reference)
    return prepared
