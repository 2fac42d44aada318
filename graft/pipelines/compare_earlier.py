"""What an earlier run of a comparison leaves to the next one: points searched, and other rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from graft.core.errors import ConfigError
from graft.pipelines.compare_contestants import Contestant
from graft.pipelines.compare_race import points_done
from graft.report.comparison_facts import BaseFacts, Comparison, MethodFacts

if TYPE_CHECKING:
    from graft.pipelines.compare import ComparePlan


def require_budget(folder: Path, entered: Sequence[Contestant], budget: int) -> None:
    """Refuses a budget that a method has exceeded before.

    Raises:
        ConfigError: Names those methods and the budget that holds for all.
    """
    done = {one.name: points_done(folder, one) for one in entered}
    above = {name: count for name, count in done.items() if count > budget}
    if above:
        told = ", ".join(f"{name} at {count} points" for name, count in above.items())
        raise ConfigError(
            f"comparison {folder.name!r} has searched {told} already, and a budget of {budget} "
            f"would favour that; set --budget (search.trials) to {max(above.values())} or more, or "
            "give the recipe another name"
        )


def earlier_comparison(path: Path, plan: ComparePlan) -> Comparison | None:
    """Reads a comparison as it stands; None where there is none.

    Raises:
        ConfigError: Rows that would stay have another budget or number of seeds, or the record
            cannot be read.
    """
    if not path.exists():
        return None
    try:
        known = Comparison.model_validate_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(
            f"{path} is no record of a comparison; remove it and name all methods again: what has "
            "been measured is not measured twice"
        ) from error
    others = [row.name for row in rows_left(known, plan)]
    if others and (known.budget, known.num_seeds) != (plan.budget, plan.num_seeds):
        raise ConfigError(
            f"comparison {plan.name!r} has {', '.join(others)} with budget {known.budget} and "
            f"{known.num_seeds} seeds, this run is for {plan.budget} and {plan.num_seeds}; "
            "name these methods too, or set --budget (search.trials) and compare.seeds as they were"
        )
    return known


def rows_left(known: Comparison, plan: ComparePlan) -> list[MethodFacts]:
    """Rows of a comparison whose methods a run does not name: they stay."""
    named = {method.name for method in plan.methods}
    return [row for row in known.methods if row.name not in named]


def with_earlier(
    rows: Sequence[MethodFacts],
    bases: dict[str, BaseFacts],
    earlier: Comparison | None,
    plan: ComparePlan,
) -> tuple[list[MethodFacts], dict[str, BaseFacts]]:
    """Adds what an earlier run has measured to what this one has until now.

    Rows of methods that this run names stand until it comes to them, if their budget is its own.
    """
    if earlier is None:
        return list(rows), bases
    is_alike = (earlier.budget, earlier.num_seeds) == (plan.budget, plan.num_seeds)
    kept = earlier.methods if is_alike else rows_left(earlier, plan)
    done = {row.name for row in rows}
    others = [row for row in kept if row.name not in done]
    return [*rows, *others], {**earlier.bases, **bases}
