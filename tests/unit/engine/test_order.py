"""Which rows a step takes, of one source and of several."""

from __future__ import annotations

from collections import Counter

import pytest

from graft.engine.order import BLOCK, batch_rows, mixed_rows

SIZES, WEIGHTS = (40, 7, 1000), (0.7, 0.2, 0.1)


def drawn(num_rows: int, *, batch_size: int = 8, seed: int = 3) -> list[tuple[int, int]]:
    return [
        pair
        for step in range(num_rows // batch_size)
        for pair in mixed_rows(seed, step, batch_size, SIZES, WEIGHTS)
    ]


def test_every_block_holds_each_source_as_often_as_its_weight_says() -> None:
    pairs = drawn(3 * BLOCK)
    for start in range(0, 3 * BLOCK, BLOCK):
        counts = Counter(source for source, _ in pairs[start : start + BLOCK])
        assert counts == {0: 700, 1: 200, 2: 100}


@pytest.mark.parametrize(
    ("weights", "shares"),
    [((1, 1, 1), [333, 333, 334]), ((999, 1), [1, 999]), ((5,), [1000]), ((1, 3), [250, 750])],
)
def test_shares_that_do_not_divide_a_block_are_rounded(
    weights: tuple[float, ...], shares: list[int]
) -> None:
    pairs = mixed_rows(0, 0, BLOCK, [3] * len(weights), weights)
    assert sorted(Counter(source for source, _ in pairs).values()) == shares


def test_within_a_source_each_row_comes_once_an_epoch() -> None:
    pairs = drawn(3 * BLOCK)
    for source, size in enumerate(SIZES[:2]):
        rows = [row for of, row in pairs if of == source]
        for start in range(0, len(rows) - size, size):
            assert sorted(rows[start : start + size]) == list(range(size))
    large = [row for of, row in pairs if of == 2]
    assert len(set(large)) == len(large) == 300


def test_the_order_does_not_depend_on_how_it_is_asked_for() -> None:
    assert drawn(2 * BLOCK, batch_size=8) == drawn(2 * BLOCK, batch_size=50)
    assert mixed_rows(3, 200, 8, SIZES, WEIGHTS) == drawn(1608)[1600:]


def test_seed_and_block_change_the_order() -> None:
    pairs = drawn(2 * BLOCK)
    assert pairs[:BLOCK] != drawn(BLOCK, seed=4)
    first, second = ([source for source, _ in part] for part in (pairs[:BLOCK], pairs[BLOCK:]))
    assert first != second


def test_two_sources_of_one_size_come_in_orders_of_their_own() -> None:
    pairs = mixed_rows(0, 0, 60, [30, 30], [1, 1])
    first, second = ([row for of, row in pairs if of == source] for source in (0, 1))
    shorter = min(len(first), len(second))
    assert first[:shorter] != second[:shorter]


def test_one_source_alone_needs_no_mixture() -> None:
    epoch = [row for step in range(5) for row in batch_rows(0, step, 2, 10)]
    assert sorted(epoch) == list(range(10))
