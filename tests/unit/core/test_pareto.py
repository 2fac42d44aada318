"""Fronts by hand: nothing worse anywhere and something better is what dominates."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from graft.core.pareto import Front, Fronts, dominates

Costs = tuple[float, ...]


def random_points(seed: int, num: int) -> list[Costs]:
    """Three costs of six values each, so that some are equal."""
    rng = random.Random(seed)
    return [tuple(rng.randrange(6) for _ in range(3)) for _ in range(num)]


def peel(points: Sequence[Costs]) -> list[list[Costs]]:
    """Fronts by their definition: what nothing left dominates, taken away again and again."""
    left, found = list(points), []
    while left:
        front = [p for p in left if not any(dominates(other, p) for other in left)]
        left = [p for p in left if p not in front]
        found.append(sorted(front))
    return found


@pytest.mark.parametrize(
    ("one", "other", "wins"),
    [
        ((1, 2), (1, 3), True),
        ((1, 2), (1, 2), False),
        ((1, 3), (2, 2), False),
        ((0, 0, 0), (0, 0, 1), True),
    ],
)
def test_dominance_is_no_worse_everywhere_and_better_somewhere(
    one: tuple[float, ...], other: tuple[float, ...], wins: bool
) -> None:
    assert dominates(one, other) == wins
    assert not dominates(other, one)


def test_fronts_by_hand() -> None:
    #   b
    #   4 |     .     E
    #   3 | A   .
    #   2 |     B C
    #   1 |           D
    fronts = Fronts()
    came = [(5, 4), (3, 2), (1, 3), (2, 2), (5, 1), (1, 3)]  # E, C, A, B, D, A again
    assert [fronts.add(point) for point in came] == [0, 0, 0, 0, 0, 0]
    assert [sorted(front) for front in fronts.points] == [
        [(1, 3), (1, 3), (2, 2), (5, 1)],
        [(3, 2)],
        [(5, 4)],
    ]
    assert [fronts.num_before(front) for front in range(4)] == [0, 4, 5, 6]


@pytest.mark.parametrize("seed", range(4))
def test_fronts_are_those_of_peeling_after_each_that_comes(seed: int) -> None:
    points, fronts = random_points(seed, 60), Fronts()
    for at, point in enumerate(points):
        found = fronts.add(point)
        assert point in fronts.points[found]
        assert [sorted(front) for front in fronts.points] == peel(points[: at + 1])
    assert len(fronts.points) > 3


def test_with_one_cost_fronts_are_ranks() -> None:
    fronts = Fronts()
    assert [fronts.add((cost,)) for cost in (0.3, 0.1, 0.2, 0.1)] == [0, 0, 1, 0]
    assert fronts.points == [[(0.1,), (0.1,)], [(0.2,)], [(0.3,)]]


@pytest.mark.parametrize("seed", range(4))
def test_a_front_is_the_first_of_the_fronts_in_the_order_of_coming(seed: int) -> None:
    points = random_points(seed, 60)
    best = peel(points)[0]
    assert Front(enumerate(points)).names == [n for n, p in enumerate(points) if p in best]
