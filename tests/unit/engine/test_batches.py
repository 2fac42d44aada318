"""How rows are divided into micro-batches, against every division that there is."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from graft.data.records import TokenRow
from graft.engine.batches import RoutedRow, micro_batches

CPU = torch.device("cpu")
PASS_TOKENS = 32


def rows_of(lengths: list[int]) -> list[RoutedRow]:
    return [
        RoutedRow("own", TokenRow([3] * length, [True] * length, f"row {at}"), at)
        for at, length in enumerate(lengths)
    ]


def lengths_of(lengths: list[int], max_tokens: int) -> list[list[int]]:
    batches = micro_batches(rows_of(lengths), max_tokens, CPU)
    return [sorted(len(r.row.input_ids) for r in batch.rows) for batch in batches]


def cost(groups: list[list[int]]) -> int:
    return sum(len(group) * max(group) + PASS_TOKENS for group in groups)


def divisions(lengths: list[int]) -> Iterator[list[list[int]]]:
    """Every way to cut sorted rows into groups."""
    for cuts in range(1 << (len(lengths) - 1)):
        groups = [[lengths[0]]]
        for at, length in enumerate(lengths[1:]):
            if cuts >> at & 1:
                groups.append([])
            groups[-1].append(length)
        yield groups


def test_a_short_row_is_not_padded_to_the_length_of_long_ones() -> None:
    assert lengths_of([512, 16, 512, 512], 2048) == [[512, 512, 512], [16]]


def test_a_row_longer_than_a_pass_may_be_stands_alone() -> None:
    assert lengths_of([30, 200, 30], 100) == [[200], [30, 30]]


@pytest.mark.parametrize("seed", range(20))
def test_no_other_division_takes_less(seed: int) -> None:
    draw = random.Random(seed)
    lengths = [draw.choice([4, 9, 30, 70, 150]) for _ in range(9)]
    max_tokens = draw.choice([100, 300, 2000])
    found = lengths_of(lengths, max_tokens)
    assert sorted(length for group in found for length in group) == sorted(lengths)
    allowed = [
        groups
        for groups in divisions(sorted(lengths))
        if all(len(group) == 1 or len(group) * max(group) <= max_tokens for group in groups)
    ]
    assert cost(found) == min(map(cost, allowed))
