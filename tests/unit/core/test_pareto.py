"""Fronts by hand: nothing worse anywhere and something better is what dominates."""

from __future__ import annotations

import random

import pytest

from graft.core.pareto import dominates, fronts


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
    points = {"A": (1, 3), "B": (2, 2), "C": (3, 2), "D": (5, 1), "E": (5, 4), "A2": (1, 3)}
    found = dict(zip(points, fronts(list(points.values())), strict=True))
    assert found == {"A": 0, "B": 0, "C": 1, "D": 0, "E": 2, "A2": 0}
    assert fronts([]) == []


def test_fronts_are_those_of_peeling_one_after_another() -> None:
    rng = random.Random(1)
    points = [tuple(rng.randrange(6) for _ in range(3)) for _ in range(60)]
    peeled, left, number = {}, set(range(len(points))), 0
    while left:
        front = {i for i in left if not any(dominates(points[j], points[i]) for j in left)}
        peeled |= dict.fromkeys(front, number)
        left, number = left - front, number + 1
    assert fronts(points) == [peeled[i] for i in range(len(points))]
    assert number > 3


def test_with_one_cost_fronts_are_ranks() -> None:
    assert fronts([(0.3,), (0.1,), (0.2,), (0.1,)]) == [2, 0, 1, 0]
