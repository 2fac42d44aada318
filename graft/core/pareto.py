"""Comparing by several costs at once; smaller is better in each."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable, Iterable, Sequence
from typing import Generic, TypeVar

Costs = Sequence[float]
Name = TypeVar("Name", bound=Hashable)


def dominates(one: Costs, other: Costs) -> bool:
    """Tells whether one is nowhere worse and somewhere better."""
    return tuple(one) != tuple(other) and all(a <= b for a, b in zip(one, other, strict=True))


class Front(Generic[Name]):
    """What nothing dominates of all that came; of equals each.

    >>> front = Front([("a", (1, 3)), ("b", (2, 4)), ("c", (2, 2))])
    >>> front.names
    ['a', 'c']
    >>> front.add("d", (1, 2))
    >>> front.names
    ['d']
    """

    def __init__(self, points: Iterable[tuple[Name, Costs]] = ()) -> None:
        self._costs: dict[Name, Costs] = {}
        for name, costs in points:
            self.add(name, costs)

    @property
    def names(self) -> list[Name]:
        """In the order of coming."""
        return list(self._costs)

    def add(self, name: Name, costs: Costs) -> None:
        """Takes in another one."""
        if any(dominates(known, costs) for known in self._costs.values()):
            return
        self._costs = {n: known for n, known in self._costs.items() if not dominates(costs, known)}
        self._costs[name] = costs


class Fronts:
    """All that came, in fronts: nothing dominates those of front 0, only front 0 those of 1, ...

    A point's front is the length of the longest chain of points of which each dominates the next.
    One that comes moves some of the front that it joins to the next one, they some of that, and so
    on; the others stay where they are.

    >>> fronts = Fronts()
    >>> [fronts.add(point) for point in [(2, 4), (1, 3), (3, 4), (2, 2)]]
    [0, 0, 1, 0]
    >>> fronts.points
    [[(1, 3), (2, 2)], [(2, 4)], [(3, 4)]]

    Reference:
        Efficient nondomination level update: Li, Deb, Zhang and Zhang, IEEE Transactions on
        Cybernetics 47(9), 2017.
    """

    def __init__(self) -> None:
        self.points: list[list[Costs]] = []
        """By front."""

    def add(self, costs: Costs) -> int:
        """Takes in another one; returns its front."""
        found = bisect_left(
            self.points,
            True,
            key=lambda front: not any(dominates(point, costs) for point in front),
        )
        at, moved = found, [costs]
        while at < len(self.points):
            stay: list[Costs] = []
            beaten: list[Costs] = []
            for point in self.points[at]:
                (beaten if any(dominates(it, point) for it in moved) else stay).append(point)
            if not stay:
                break  # the whole front, and so every later one, is one further on
            self.points[at] = stay + moved
            if not beaten:
                return found
            at, moved = at + 1, beaten
        self.points.insert(at, moved)
        return found

    def num_before(self, front: int) -> int:
        """Counts the points of the fronts before one."""
        return sum(map(len, self.points[:front]))
