"""Forward passes without gradient over many rows, on a CPU in lanes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch

from graft.data.records import TokenRow
from graft.engine.batches import MicroBatch, RoutedRow, collate
from graft.engine.lanes import Lanes, divide, in_lanes
from graft.engine.logprobs import batch_hidden
from graft.engine.lower_states import batches_of, row_key

if TYPE_CHECKING:
    from graft.engine.multi import MultiAdapterModel

READ_TOKENS = 2048
"""Padded tokens that are read at once."""

Found = TypeVar("Found")


def read_rows_by(
    model: MultiAdapterModel, rows: Sequence[RoutedRow], read: Callable[[MicroBatch], Found]
) -> Iterator[tuple[MicroBatch, Found]]:
    """Reads rows of like length together; yields each micro-batch with what was found.

    Rows are those that come again: what layers below all slots make of them is kept.

    Args:
        model: Holds the rows' slots.
        rows: In any order.
        read: Runs the model on one micro-batch.
    """
    keep_lower_states(model, [routed.row for routed in rows], READ_TOKENS)
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
    return batches_of(model, rows, lanes.max_tokens), lanes.number


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


def keep_lower_states(model: MultiAdapterModel, rows: Iterable[TokenRow], max_tokens: int) -> None:
    """Reads what the layers below all slots make of rows, each once, while there is room for it.

    To be called before passes over rows that come again; nothing else runs meanwhile.

    Args:
        model: Holds the rows' slots.
        rows: Any; those that are known are passed over.
        max_tokens: Padded tokens that are read at once.
    """
    lower = model.lower
    if not lower.settle():
        return
    # A row that is expanded has its prompt in several lines.
    own = (row for row in rows if model.shares_prompts or row.num_branches == 1)
    new = {key: row for row in own if not lower.has(key := row_key(row))}
    # What is kept is to be of use to passes that record gradients, too.
    with torch.inference_mode(False), torch.no_grad():
        if new and lower.is_chain is None:
            lower.tried(_starts_in_the_middle(model, next(iter(new.values()))))
        if new and lower.is_chain:
            _read_below(model, new, max_tokens)


def _read_below(model: MultiAdapterModel, new: Mapping[bytes, TokenRow], max_tokens: int) -> None:
    lower, room = model.lower, model.lower.free_bytes()
    fitting = []
    for key, row in new.items():
        room -= lower.row_bytes(len(row.input_ids))
        if room < 0:
            break
        fitting.append((key, row))
    routed = [RoutedRow(None, row, at) for at, (_, row) in enumerate(fitting)]
    batches, lanes = reading_batches(model, routed, max_tokens)
    for batch, states in read_batches(model, batches, partial(_states_below, model), lanes):
        assert states is not None
        for routed_row, states_TE in zip(batch.rows, states, strict=True):
            key, row = fitting[routed_row.position]
            lower.keep(key, states_TE[: len(row.input_ids)])


def _states_below(model: MultiAdapterModel, batch: MicroBatch) -> torch.Tensor | None:
    """Runs a micro-batch up to the lowest adapted layer; None where a base does not allow that."""
    with model.lower.read() as states:
        batch_hidden(model, batch)
        return states()


def _starts_in_the_middle(model: MultiAdapterModel, row: TokenRow) -> bool:
    """Says whether a pass in two parts comes to what a whole one does, on one row."""
    routed = [RoutedRow(None, row, 0)]
    batch = collate(routed, model.device, shares_prompts=model.shares_prompts)
    whole = batch_hidden(model, batch)
    states = _states_below(model, batch)
    if states is None:
        return False
    with model.lower.skipped(states):
        again = batch_hidden(model, batch)
    return bool((again - whole).norm() <= whole.norm() * torch.finfo(whole.dtype).eps ** 0.5)
