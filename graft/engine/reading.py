"""Forward passes without gradient over many rows, on a CPU in lanes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch

from graft.engine.batches import MicroBatch, RoutedRow, micro_batches
from graft.engine.lanes import Lanes, divide, in_lanes

if TYPE_CHECKING:
    from graft.engine.multi import MultiAdapterModel

READ_TOKENS = 2048
"""Padded tokens that are read at once."""

Found = TypeVar("Found")


def read_rows_by(
    model: MultiAdapterModel, rows: Sequence[RoutedRow], read: Callable[[MicroBatch], Found]
) -> Iterator[tuple[MicroBatch, Found]]:
    """Reads rows of like length together; yields each micro-batch with what was found.

    Args:
        model: Holds the rows' slots.
        rows: In any order.
        read: Runs the model on one micro-batch.
    """
    batches, lanes = reading_batches(model, rows, READ_TOKENS)
    return read_batches(model, batches, read, lanes)


def reading_batches(
    model: MultiAdapterModel,
    rows: Sequence[RoutedRow],
    max_tokens: int,
    *,
    takes_lanes: bool = True,
) -> tuple[list[MicroBatch], int]:
    """Returns the micro-batches of some rows, and how many of them are read at once.

    Args:
        model: Layers that are divided between workers are gathered by one pass at a time.
        rows: In any order.
        max_tokens: Padded tokens that are read at once.
        takes_lanes: Passes may run side by side.
    """
    lanes = Lanes(1, max_tokens)
    if takes_lanes and not model.is_partitioned:
        num_tokens = sum(len(routed.row.input_ids) for routed in rows)
        lanes = divide(num_tokens, max_tokens, model.device)
    shares = model.shares_prompts
    return micro_batches(rows, lanes.max_tokens, model.device, shares_prompts=shares), lanes.number


def read_batches(
    model: MultiAdapterModel,
    batches: Sequence[MicroBatch],
    read: Callable[[MicroBatch], Found],
    lanes: int,
) -> Iterator[tuple[MicroBatch, Found]]:
    """Runs some micro-batches, `lanes` at once; yields each with what was found, in order."""
    mode = torch.inference_mode if torch.is_inference_mode_enabled() else torch.no_grad

    def in_lane(batch: MicroBatch, as_here: AbstractContextManager[None]) -> Found:
        with mode(), as_here:
            return read(batch)

    for start in range(0, len(batches), lanes):
        group = batches[start : start + lanes]
        # What methods tell of themselves in a lane is told to whoever asked in this thread.
        work = [partial(in_lane, batch, model.routing_as_now()) for batch in group]
        yield from zip(group, in_lanes(work), strict=True)
