"""Log-probabilities of the supervised tokens: the output head runs on their positions only.

Shapes: P supervised positions, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from graft.data.records import TokenRow
from graft.engine.batches import MicroBatch
from graft.engine.lower_states import from_lower_states
from graft.engine.multi import MultiAdapterModel, Routing
from graft.methods.routing import DropoutStream
from graft.objectives.base import TokenOutputs

_CHUNK_POSITIONS = 256
"""Positions whose logits stand in memory at once."""
_BLOCK_NUMBERS = 2**18
"""Logits whose softmax a CPU makes at once; a megabyte of fp32 stays in its cache."""
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
    given = hidden_PH, targets_P, temperatures_P
    is_recorded = torch.is_grad_enabled() and hidden_PH.requires_grad
    if is_recorded and not (model.is_owned or model.is_partitioned):
        frozen: Any = _FrozenHead.apply
        logprobs_P, entropy_P = frozen(model, with_entropy, *given)
        return logprobs_P, entropy_P if with_entropy else None

    def of_chunk(
        hidden: torch.Tensor, targets: torch.Tensor, temperatures: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        scores = _scores(model.logits(hidden), temperatures)
        logprobs = -torch.nn.functional.cross_entropy(scores, targets, reduction="none")
        return logprobs, _entropy(scores.detach()) if with_entropy else None

    chunks = _chunks(*given)
    if is_recorded and len(chunks) > 1:  # made again in the backward pass
        found = [checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in chunks]
    else:
        found = [of_chunk(*chunk) for chunk in chunks]
    logprobs, entropies = zip(*found, strict=True)
    return torch.cat(logprobs), torch.cat(entropies) if with_entropy else None


class _FrozenHead(torch.autograd.Function):
    """Log-probabilities under a head that takes no gradient; no logits are kept or made again.

    A log-probability depends on its own state alone, so its gradient is what comes from above times
    one vector, which is known as soon as the logits are.
    """

    @staticmethod
    def forward(
        ctx: Any,
        model: MultiAdapterModel,
        with_entropy: bool,
        hidden_PH: torch.Tensor,
        targets_P: torch.Tensor,
        temperatures_P: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs, entropies = list[torch.Tensor](), list[torch.Tensor]()
        slopes = list[torch.Tensor]()
        for hidden, targets, temperatures in _chunks(hidden_PH, targets_P, temperatures_P):
            with torch.enable_grad():
                state = hidden.detach().requires_grad_()
                logits = model.logits(state)
            slope_CV = torch.empty_like(logits)
            for rows in _blocks(logits):
                own = None if temperatures is None else temperatures[rows]
                log_BV = _scores(logits.detach()[rows], own).log_softmax(-1)
                targets_B1 = targets[rows, None]
                logprobs.append(log_BV.gather(1, targets_B1)[:, 0])
                if with_entropy:
                    entropies.append(-(log_BV.exp() * log_BV).sum(-1))
                log_BV.exp_().neg_().scatter_add_(1, targets_B1, torch.ones_like(log_BV[:, :1]))
                slope_CV[rows] = log_BV if own is None else log_BV / own[:, None].to(log_BV.dtype)
            slopes += torch.autograd.grad(logits, state, slope_CV)
        ctx.save_for_backward(torch.cat(slopes))
        entropy_P = torch.cat(entropies) if with_entropy else hidden_PH.new_zeros(0)
        ctx.mark_non_differentiable(entropy_P)
        return torch.cat(logprobs), entropy_P

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, gradient_P: torch.Tensor, _: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        (slope_PH,) = ctx.saved_tensors
        return None, None, (gradient_P[:, None] * slope_PH).to(slope_PH.dtype), None, None


def _chunks(
    hidden_PH: torch.Tensor, targets_P: torch.Tensor, temperatures_P: torch.Tensor | None
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """Cuts positions into chunks; none at all are one empty chunk."""
    cuts = [
        slice(at, at + _CHUNK_POSITIONS)
        for at in range(0, max(len(targets_P), 1), _CHUNK_POSITIONS)
    ]
    return [
        (hidden_PH[cut], targets_P[cut], None if temperatures_P is None else temperatures_P[cut])
        for cut in cuts
    ]


def _blocks(logits_CV: torch.Tensor) -> list[slice]:
    """Cuts a chunk's rows into blocks whose softmax stays in a CPU's cache; a GPU has one."""
    num_rows, width = logits_CV.shape
    rows = max(1, _BLOCK_NUMBERS // width) if logits_CV.device.type == "cpu" else max(1, num_rows)
    return [slice(at, at + rows) for at in range(0, max(num_rows, 1), rows)]


def _scores(logits_PV: torch.Tensor, temperatures_P: torch.Tensor | None) -> torch.Tensor:
    """Logits of the distributions that are meant, at least fp32."""
    scores_PV = logits_PV.to(torch.promote_types(logits_PV.dtype, torch.float32))
    if temperatures_P is None:
        return scores_PV
    return scores_PV / temperatures_P[:, None].to(scores_PV.dtype)


@torch.no_grad()
def _entropy(logits_PV: torch.Tensor) -> torch.Tensor:
    """Entropy of each row, a few rows at a time: no second copy of the logits is made."""
    found = []
    for rows_PV in logits_PV.split(_ENTROPY_POSITIONS):
        logprobs_PV = rows_PV.log_softmax(-1)
        found.append(-(logprobs_PV.exp() * logprobs_PV).sum(-1))
    return torch.cat(found) if found else logits_PV.new_zeros(0)
