"""Log-probabilities of the supervised tokens: the output head runs on their positions only.

Shapes: P supervised positions, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch.utils.checkpoint import checkpoint

from graft.data.records import TokenRow
from graft.engine.batches import MicroBatch
from graft.engine.multi import MultiAdapterModel, Routing
from graft.methods.routing import DropoutStream
from graft.objectives.base import TokenOutputs

_CHUNK_POSITIONS = 1024
"""Positions whose logits stand in memory at once; more are recomputed in the backward pass."""


def supervised_logprobs(
    model: MultiAdapterModel,
    batch: MicroBatch,
    streams: Callable[[str, torch.Tensor], DropoutStream] | None = None,
) -> torch.Tensor:
    """Runs one micro-batch.

    Args:
        model: The base with its slots.
        batch: The rows.
        streams: Makes a slot's dropout stream from its global row indices; None drops nothing.

    Returns:
        Log-probability of each supervised token, `[positions]`, fp32 or fp64.
    """
    hidden = batch_hidden(model, batch, streams)
    hidden_PH = hidden[batch.supervised_lines, batch.predicting_tokens]
    targets_P = batch.input_ids[batch.supervised_lines, batch.supervised_tokens]
    return target_logprobs(model, hidden_PH, targets_P)


def slot_outputs(
    batch: MicroBatch,
    logprobs_P: torch.Tensor,
    statistics: Mapping[str, Mapping[str, float]],
) -> dict[str, TokenOutputs]:
    """Divides what came of a micro-batch between its slots.

    Args:
        batch: Rows that all belong to a slot.
        logprobs_P: Of its supervised tokens.
        statistics: Of the whole step, by slot.
    """
    found = {}
    start = 0
    for name, count in batch.slots:
        assert name is not None  # training rows always belong to a slot
        is_own = (batch.supervised_rows >= start) & (batch.supervised_rows < start + count)
        rows = tuple(routed.row for routed in batch.rows[start : start + count])
        found[name] = TokenOutputs(
            rows,
            logprobs_P[is_own],
            batch.supervised_rows[is_own] - start,
            batch.supervised_branches[is_own],
            extra=_extra_of(rows, logprobs_P),
            statistics=statistics.get(name, {}),
        )
        start += count
    return found


def _extra_of(rows: Sequence[TokenRow], like: torch.Tensor) -> dict[str, torch.Tensor]:
    names = set.intersection(*(set(row.extra or ()) for row in rows))
    return {
        name: like.new_tensor([value for row in rows for value in (row.extra or {})[name]])
        for name in sorted(names)
    }


def batch_hidden(
    model: MultiAdapterModel,
    batch: MicroBatch,
    streams: Callable[[str, torch.Tensor], DropoutStream] | None = None,
) -> torch.Tensor:
    """Runs one micro-batch; returns final hidden states, `[lines, tokens, hidden]`."""
    names = tuple(slot for slot, _ in batch.slot_lines)
    counts = tuple(count for _, count in batch.slot_lines)
    made: list[DropoutStream | None] = []
    if streams is not None:
        positions = torch.tensor([batch.rows[at].position for at in batch.lines])
        of_slots = positions.to(model.device).split(counts)
        made = [
            None if name is None else streams(name, rows)
            for name, rows in zip(names, of_slots, strict=True)
        ]
        if batch.columns is not None:
            columns = batch.columns.split(counts)
            made = [s and replace(s, columns=c) for s, c in zip(made, columns, strict=True)]
    return model.hidden(
        batch.input_ids,
        routing=Routing(names, counts, tuple(made)),
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        branches=batch.branches,
    )


def target_logprobs(
    model: MultiAdapterModel, hidden_PH: torch.Tensor, targets_P: torch.Tensor
) -> torch.Tensor:
    """Log-probability of each target from the hidden state that predicts it, in chunks."""

    def of_chunk(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = model.logits(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return -torch.nn.functional.cross_entropy(logits, targets, reduction="none")

    if hidden_PH.shape[0] <= _CHUNK_POSITIONS:
        return of_chunk(hidden_PH, targets_P)
    chunks = zip(hidden_PH.split(_CHUNK_POSITIONS), targets_P.split(_CHUNK_POSITIONS), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([of_chunk(hidden, targets) for hidden, targets in chunks])
    return torch.cat(
        [checkpoint(of_chunk, hidden, targets, use_reentrant=False) for hidden, targets in chunks]
    )
