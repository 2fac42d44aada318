"""Log-probabilities without gradient, of rows that all workers score together."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch

from graft.data.records import TokenRow
from graft.engine.backends.base import Backend
from graft.engine.batches import MicroBatch, RoutedRow, micro_batches
from graft.engine.logprobs import supervised_logprobs
from graft.engine.multi import MultiAdapterModel
from graft.objectives.base import TokenOutputs

Scores = Sequence[float]
"""One number for each target of a row."""


@torch.no_grad()
def score_rows(
    model: MultiAdapterModel,
    slot: str | None,
    rows: Sequence[TokenRow],
    *,
    backend: Backend,
    max_tokens: int,
) -> list[Scores]:
    """Returns the log-probability of each target of each row; nothing is dropped.

    Every worker calls it with the same rows, reads its share of them, and gets all.

    Args:
        model: Holds the slot.
        slot: Whose rows they are; None is the bare base.
        rows: Any.
        backend: Of the training that asks.
        max_tokens: Padded tokens of one forward pass.
    """
    if not rows:
        return []
    routed = [RoutedRow(slot, row, at) for at, row in enumerate(rows)]
    routed.sort(key=lambda r: (-len(r.row.input_ids), r.position))

    def batched(some: list[RoutedRow]) -> list[MicroBatch]:
        return micro_batches(some, max_tokens, model.device, shares_prompts=model.shares_prompts)

    batches = batched(routed[backend.world_rank :: backend.world_size])
    num_own = len(batches)
    # An idle worker runs along: collectives inside the model need everyone.
    num_idle = backend.forward_backward_count(num_own) - num_own
    batches += batched(routed[-1:]) * num_idle
    counts = [len(row.targets) for row in rows]
    starts = list(accumulate(counts, initial=0))
    flat = torch.zeros(starts[-1], dtype=torch.float64)
    for run, batch in enumerate(batches):
        logprobs = supervised_logprobs(model, batch).double().cpu()
        if run < num_own:
            of_rows = logprobs.split([counts[r.position] for r in batch.rows])
            for member, found in zip(batch.rows, of_rows, strict=True):
                start = starts[member.position]
                flat[start : start + found.numel()] = found
    whole = backend.all_reduce_sum(flat).split(counts)
    return [array("d", scores.tolist()) for scores in whole]


def outputs_of(
    rows: Sequence[TokenRow], logprobs: Sequence[Scores], extra: Mapping[str, Sequence[Scores]]
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
    )
