"""Which rows a step takes: a function of the seed and the step, with no state to save."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from graft.core.seeds import derive_seed

BLOCK = 1000
"""Positions in which every source of a mixture stands as often as its weight says."""


@lru_cache(maxsize=256)
def _permutation(seed: int, epoch: int, num_rows: int) -> tuple[int, ...]:
    generator = np.random.Generator(np.random.Philox(derive_seed("order", seed, epoch)))
    return tuple(int(i) for i in generator.permutation(num_rows))


def batch_rows(seed: int, step: int, batch_size: int, num_rows: int) -> list[int]:
    """Returns the rows of one step, a new permutation each epoch; a batch may span two epochs.

    >>> sorted(batch_rows(0, 0, 2, 4) + batch_rows(0, 1, 2, 4))
    [0, 1, 2, 3]
    """
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [_permutation(seed, p // num_rows, num_rows)[p % num_rows] for p in positions]


def mixed_rows(
    seed: int, step: int, batch_size: int, sizes: Sequence[int], weights: Sequence[float]
) -> list[tuple[int, int]]:
    """Returns the source and its row for each row of one step.

    Of every `BLOCK` rows each source gives its share, in an order of chance; within a source the
    rows come as from `batch_rows`, so that a small one is seen again while a large one is not yet
    through.

    Args:
        seed: Of the order.
        step: Steps done before.
        batch_size: Rows a step.
        sizes: Rows of each source.
        weights: Of each source; only their ratios count. None is below a `BLOCK`th of their sum.

    >>> sorted(source for source, _ in mixed_rows(0, 0, BLOCK, [5, 5], [1, 3]))[248:252]
    [0, 0, 1, 1]
    """
    shares = _shares(tuple(weights))
    seeds = [derive_seed("source", seed, source) for source in range(len(sizes))]
    drawn = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        block, place = divmod(position, BLOCK)
        source, earlier = _block(seed, block, shares)[place]
        (row,) = batch_rows(seeds[source], block * shares[source] + earlier, 1, sizes[source])
        drawn.append((source, row))
    return drawn


@lru_cache(maxsize=64)
def _shares(weights: tuple[float, ...]) -> tuple[int, ...]:
    """Divides a block by weight, what is left over by largest remainder."""
    exact = [BLOCK * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda at: shares[at] - exact[at])
    for at in by_remainder[: BLOCK - sum(shares)]:
        shares[at] += 1
    return tuple(shares)


@lru_cache(maxsize=64)
def _block(seed: int, block: int, shares: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Source of each position of a block, and how many of it stand before in the block."""
    sources = np.repeat(np.arange(len(shares)), shares)
    generator = np.random.Generator(np.random.Philox(derive_seed("mixture", seed, block)))
    seen = [0] * len(shares)
    places = []
    for source in generator.permutation(sources).tolist():
        places.append((source, seen[source]))
        seen[source] += 1
    return tuple(places)
