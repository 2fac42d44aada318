"""Comparing by several costs at once; smaller is better in each."""

from __future__ import annotations

from collections.abc import Sequence

Costs = Sequence[float]


def dominates(one: Costs, other: Costs) -> bool:
    """Tells whether one is nowhere worse and somewhere better."""
    return tuple(one) != tuple(other) and all(a <= b for a, b in zip(one, other, strict=True))


def fronts(points: Sequence[Costs]) -> list[int]:
    """Returns each point's front: 0 where nothing dominates it, 1 where only front 0 does, ...

    It is the length of the longest chain of points of which each dominates the next.

    >>> fronts([(1, 3), (2, 2), (2, 4), (3, 4), (1, 3)])
    [0, 0, 1, 2, 0]
    """
    order = sorted(range(len(points)), key=lambda at: tuple(points[at]))
    found = [0] * len(points)
    for position, at in enumerate(order):
        before = (found[it] for it in order[:position] if dominates(points[it], points[at]))
        found[at] = 1 + max(before, default=-1)
    return found
