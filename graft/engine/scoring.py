"""Log-probabilities without gradient, of rows that all workers score together."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import torch

from graft.data.records import TokenRow
from graft.engine.backends.base import Backend
from graft.engine.batches import MicroBatch, RoutedRow
from graft.engine.logprobs import read_positions
from graft.engine.multi import MultiAdapterModel
from graft.engine.reading import read_batches, reading_batches
from graft.objectives.base import TokenOutputs

Scores = Sequence[float]
"""One number for each target of a row."""


class RowScores(NamedTuple):
    """What rows come to under one slot."""

    logprobs: list[Scores]
    """Log-probability of each target of each row."""
    values: list[Scores] | None
    """What the slot's head makes of the states that predict them; None where it has none."""


def score_rows(
    model: MultiAdapterModel,
    slot: str | None,
    rows: Sequence[TokenRow],
    *,
    backend: Backend,
    max_tokens: int,
    temperature: float = 1.0,
) -> list[Scores]:
    """Returns the log-probability of each target of each row; see `read_rows`."""
    read = read_rows(
        model, slot, rows, backend=backend, max_tokens=max_tokens, temperature=temperature
    )
    return read.logprobs


@torch.no_grad()
def read_rows(
    model: MultiAdapterModel,
    slot: str | None,
    rows: Sequence[TokenRow],
    *,
    backend: Backend,
    max_tokens: int,
    temperature: float = 1.0,
) -> RowScores:
    """Reads rows under a slot; nothing is dropped.

    Every worker calls it with the same rows, reads its share of them, and gets all.

    Args:
        model: Holds the slot.
        slot: Whose rows they are; None is the bare base.
        rows: Any.
        backend: Of the training that asks.
        max_tokens: Padded tokens of one forward pass.
        temperature: Of the distributions.
    """
    head = slot if slot in model.heads else None
    if not rows:
        return RowScores([], None if head is None else [])
    routed = [RoutedRow(slot, row, at) for at, row in enumerate(rows)]
    routed.sort(key=lambda r: (-len(r.row.input_ids), r.position))

    has_lanes = backend.takes_lanes and backend.world_size == 1
    own = routed[backend.world_rank :: backend.world_size]
    batches, lanes = reading_batches(model, own, max_tokens, takes_lanes=has_lanes)
    num_own = len(batches)
    # An idle worker runs along: collectives inside the model need everyone.
    num_idle = backend.forward_backward_count(num_own) - num_own
    batches += reading_batches(model, routed[-1:], max_tokens)[0] * num_idle
    counts = [len(row.targets) for row in rows]
    starts = list(accumulate(counts, initial=0))
    flat = torch.zeros(1 if head is None else 2, starts[-1], dtype=torch.float64)
    read = partial(_read, model, head=head, temperature=temperature)
    for run, (batch, found) in enumerate(read_batches(model, batches, read, lanes)):
        if run < num_own:
            of_rows = found.split([counts[r.position] for r in batch.rows], dim=1)
            for member, scores in zip(batch.rows, of_rows, strict=True):
                start = starts[member.position]
                flat[:, start : start + scores.shape[1]] = scores
    channels: list[list[Scores]] = [
        [array("d", scores.tolist()) for scores in channel.split(counts)]
        for channel in backend.all_reduce_sum(flat)
    ]
    return RowScores(channels[0], channels[1] if head is not None else None)


def _read(
    model: MultiAdapterModel, batch: MicroBatch, head: str | None, temperature: float
) -> torch.Tensor:
    """Returns log-probabilities, and values below them where there is a head, in fp64 on a CPU."""
    temperatures = {slot or "": temperature for slot, _ in batch.slots}
    positions = read_positions(model, batch, temperatures=temperatures)
    found = [positions.logprobs_P]
    if head is not None:
        found.append(model.heads.values(head, positions.hidden_PH))
    return torch.stack([channel.double().cpu() for channel in found])


def outputs_of(
    rows: Sequence[TokenRow],
    logprobs: Sequence[Scores],
    extra: Mapping[str, Sequence[Scores]],
    values: Sequence[Scores] | None = None,
) -> TokenOutputs:
    """Puts scores together as objectives see them, in double precision."""

    def joined(of_rows: Sequence[Scores]) -> torch.Tensor:
        flat = [value for scores in of_rows for value in scores]
        return torch.tensor(flat, dtype=torch.float64)

    counts = torch.tensor([len(row.targets) for row in rows])
    branches = [row.branch[at] if row.branch else 0 for row in rows for at in row.targets]
    return TokenOutputs(
        tuple(rows),
        joined(logprobs),
        torch.repeat_interleave(torch.arange(len(rows)), counts),
        torch.tensor(branches),
        extra={name: joined(of_rows) for name, of_rows in extra.items()},
        values_P=None if values is None else joined(values),
    )
