"""Log-probabilities of the supervised tokens: the output head runs on their positions only.

Shapes: P supervised positions, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from graft.data.records import TokenRow
from graft.engine.batches import MicroBatch
from graft.engine.lower_states import from_lower_states
from graft.engine.multi import MultiAdapterModel, Routing
from graft.methods.routing import DropoutStream
from graft.objectives.base import TokenOutputs

_CHUNK_POSITIONS = 1024
"""Positions whose logits stand in memory at once; more are recomputed in the backward pass."""
_ENTROPY_POSITIONS = 64


Streams = Callable[[str, torch.Tensor], DropoutStream]
"""Makes a slot's dropout stream from its global row indices."""


class Positions(NamedTuple):
    """What a micro-batch's supervised tokens come to."""

    logprobs_P: torch.Tensor
    """Log-probability of each, fp32 or fp64."""
    entropy_P: torch.Tensor | None
    """Entropy of its distribution, nats, without gradient; None where nobody asked."""
    hidden_PH: torch.Tensor
    """State that predicts it."""


def read_positions(
    model: MultiAdapterModel,
    batch: MicroBatch,
    streams: Streams | None = None,
    *,
    temperatures: Mapping[str, float] | None = None,
    with_entropy: bool = False,
) -> Positions:
    """Runs one micro-batch; layers below all slots are left out where their states are kept.

    Args:
        model: The base with its slots.
        batch: The rows.
        streams: None drops nothing.
        temperatures: Of the slots whose distributions are not the model's own; their logits are
            divided by it.
        with_entropy: Entropies are wanted too.
    """
    with from_lower_states(model, batch):
        hidden = batch_hidden(model, batch, streams)
    hidden_PH = hidden[batch.supervised_lines, batch.predicting_tokens]
    targets_P = batch.input_ids[batch.supervised_lines, batch.supervised_tokens]
    temperatures_P = _of_positions(batch, temperatures or {}, model.device)
    found = _target_logprobs(model, hidden_PH, targets_P, temperatures_P, with_entropy)
    return Positions(*found, hidden_PH)


def supervised_logprobs(
    model: MultiAdapterModel, batch: MicroBatch, streams: Streams | None = None
) -> torch.Tensor:
    """Runs one micro-batch; returns the log-probability of each supervised token, `[positions]`."""
    return read_positions(model, batch, streams).logprobs_P


def _of_positions(
    batch: MicroBatch, temperatures: Mapping[str, float], device: torch.device
) -> torch.Tensor | None:
    if all(value == 1 for value in temperatures.values()):
        return None
    of_rows = [temperatures.get(routed.slot or "", 1.0) for routed in batch.rows]
    return torch.tensor(of_rows, dtype=torch.float64, device=device)[batch.supervised_rows]


def slot_outputs(
    model: MultiAdapterModel,
    batch: MicroBatch,
    positions: Positions,
    statistics: Mapping[str, Mapping[str, float]],
) -> dict[str, TokenOutputs]:
    """Divides what came of a micro-batch between its slots; those with a head have values.

    Args:
        model: Has the heads.
        batch: Rows that all belong to a slot.
        positions: Of its supervised tokens.
        statistics: Of the whole step, by slot.
    """
    logprobs_P, entropy_P, hidden_PH = positions
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
            values_P=model.heads.values(name, hidden_PH[is_own]) if name in model.heads else None,
            entropy_P=None if entropy_P is None else entropy_P[is_own],
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
    streams: Streams | None = None,
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


def _target_logprobs(
    model: MultiAdapterModel,
    hidden_PH: torch.Tensor,
    targets_P: torch.Tensor,
    temperatures_P: torch.Tensor | None,
    with_entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probability of each target from the state that predicts it, in chunks; and entropies."""

    def of_chunk(
        hidden: torch.Tensor, targets: torch.Tensor, temperatures: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        logits = model.logits(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if temperatures is not None:
            logits = logits / temperatures[:, None].to(logits.dtype)
        logprobs = -torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        return logprobs, _entropy(logits.detach()) if with_entropy else None

    def run(start: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        own = slice(start, start + _CHUNK_POSITIONS)
        given = (
            hidden_PH[own],
            targets_P[own],
            None if temperatures_P is None else temperatures_P[own],
        )
        if hidden_PH.shape[0] <= _CHUNK_POSITIONS or not torch.is_grad_enabled():
            return of_chunk(*given)
        found: tuple[torch.Tensor, torch.Tensor | None] = checkpoint(
            of_chunk, *given, use_reentrant=False
        )
        return found

    starts = range(0, max(hidden_PH.shape[0], 1), _CHUNK_POSITIONS)
    chunks = [run(start) for start in starts]
    entropies = [entropy for _, entropy in chunks if entropy is not None]
    return torch.cat([found for found, _ in chunks]), torch.cat(entropies) if entropies else None


@torch.no_grad()
def _entropy(logits_PV: torch.Tensor) -> torch.Tensor:
    """Entropy of each row, a few rows at a time: no second copy of the logits is made."""
    found = []
    for rows_PV in logits_PV.split(_ENTROPY_POSITIONS):
        logprobs_PV = rows_PV.log_softmax(-1)
        found.append(-(logprobs_PV.exp() * logprobs_PV).sum(-1))
    return torch.cat(found) if found else logits_PV.new_zeros(0)
