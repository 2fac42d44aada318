"""How many numbers ZeRO moves or holds at once: much for a transfer, little beside what it divides.

DeepSpeed's own sizes are those of large models: 500 million numbers in a buffer for gradients, 2 GB
that a GPU reserves for the smallest adapter; and weights stay gathered up to a billion, so of a
smaller base stage 3 would divide nothing. Here they follow the model.
"""

from __future__ import annotations

_REDUCE = (1_000_000, 50_000_000)
_GATHER = (1_000_000, 1_000_000_000)
_AHEAD = 50_000_000


def reduce_bucket(num_trained: int) -> int:
    """Numbers that are reduced, or gathered after a step, together; even, as DeepSpeed asks."""
    smallest, largest = _REDUCE
    return min(largest, max(smallest, num_trained // 8)) // 2 * 2


def max_live(num_weights: int) -> int:
    """Numbers that stage 3 keeps gathered for their next use."""
    smallest, largest = _GATHER
    return min(largest, max(smallest, num_weights // 4))


def prefetch_bucket(num_weights: int) -> int:
    """Numbers that stage 3 gathers ahead of their use."""
    return min(_AHEAD, max_live(num_weights) // 4)
