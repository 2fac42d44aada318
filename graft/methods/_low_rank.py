"""The product that LoRA and its kin share, for the rows of several slots at once.

Shapes: S slots, N rows, T tokens, I in_features, O out_features, R rank (the largest of the slots).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graft.methods._dropout import keep_scale
from graft.methods.routing import GroupRouting


class _Pile(torch.autograd.Function):
    """One copy a matrix there, and one back.

    Padding, scaling, casting and stacking, each an operation of its own that autograd repeats,
    took a fifth of a step of many small slots (SmolLM2-135M, 8 slots of 64 tokens, 2 CPU cores).
    """

    @staticmethod
    def forward(
        ctx: Any, dtype: torch.dtype, scales: Sequence[float] | None, *parts: torch.Tensor
    ) -> torch.Tensor:
        ctx.scales, ctx.likes = scales, [(part.shape, part.dtype) for part in parts]
        views = parts if scales is None else [part.T for part in parts]
        ranks = [view.shape[0] for view in views]
        make = views[0].new_empty if len(set(ranks)) == 1 else views[0].new_zeros
        pile_SRW = make((len(views), max(ranks), views[0].shape[1]), dtype=dtype)
        for at, (view, rank) in enumerate(zip(views, ranks, strict=True)):
            if scales is None:
                pile_SRW[at, :rank].copy_(view)
            else:
                torch.mul(view, scales[at], out=pile_SRW[at, :rank])
        return pile_SRW

    @staticmethod
    def backward(ctx: Any, gradient_SRW: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        found: list[torch.Tensor | None] = []
        for at, (shape, dtype) in enumerate(ctx.likes):
            if not ctx.needs_input_grad[2 + at]:
                found.append(None)
                continue
            gradient = gradient_SRW.new_empty(shape, dtype=dtype)
            if ctx.scales is None:
                gradient.copy_(gradient_SRW[at, : shape[0]])
            else:
                gradient.copy_(gradient_SRW[at, : shape[1]].T).mul_(ctx.scales[at])
            found.append(gradient)
        return None, None, *found


def factors(
    a: Sequence[torch.Tensor],
    b: Sequence[torch.Tensor],
    scales: Sequence[float],
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """Returns what `low_rank_product` takes, of slots whose ranks may differ.

    Args:
        a: Of each slot, `[r, I]`.
        b: `[O, r]`.
        scales: Folded into B.
        dtype: The base's.
    """
    dtype = _factor_dtype(a[0].device, dtype)
    pile: Any = _Pile.apply
    return {"a_SIR": pile(dtype, None, *a).transpose(1, 2), "b_SRO": pile(dtype, scales, *b)}


def _factor_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The base's, but fp32 where a CPU answers in bf16, for its few tokens a step."""
    if device.type == "cpu" and dtype == torch.bfloat16 and not torch.is_grad_enabled():
        return torch.float32
    return dtype


def stacked_factors(
    a_SRI: torch.Tensor, b_SRO: torch.Tensor, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Returns what `low_rank_product` takes of stacks that are padded and scaled already."""
    dtype = _factor_dtype(a_SRI.device, dtype)
    return {"a_SIR": a_SRI.to(dtype).transpose(1, 2), "b_SRO": b_SRO.to(dtype)}


def low_rank_product(
    x_NTI: torch.Tensor, a_SIR: torch.Tensor, b_SRO: torch.Tensor, routing: GroupRouting
) -> torch.Tensor:
    """Two products a slot: batched where all have as many rows, else one slot after another.

    Where slots have hardly a token each, as adapters of many tenants do that decode, products are
    batched over rows instead, each with its own copy of the factors.
    """
    num_slots, dtype = len(routing.slots), x_NTI.dtype
    rows, tokens, width = x_NTI.shape
    if a_SIR.dtype != dtype:
        if rows * tokens <= _FEW_TOKENS:
            x_NTI = x_NTI.to(a_SIR.dtype)
        else:
            a_SIR, b_SRO = a_SIR.to(dtype), b_SRO.to(dtype)
    if len(set(routing.num_rows)) == 1:
        x_SMI = x_NTI.reshape(num_slots, rows // num_slots * tokens, width)
        product = torch.bmm(torch.bmm(x_SMI, a_SIR), b_SRO)
    elif rows * tokens < _TOKENS_OF_SLOT * num_slots:
        slot_N = routing.slot_of_row(x_NTI.device)
        product = torch.bmm(torch.bmm(x_NTI, a_SIR[slot_N]), b_SRO[slot_N])
    else:
        own = zip(x_NTI.split(list(routing.num_rows)), a_SIR.unbind(), b_SRO.unbind(), strict=True)
        product = torch.cat([x_nTI.reshape(-1, width) @ a_IR @ b_RO for x_nTI, a_IR, b_RO in own])
    return product.view(rows, tokens, b_SRO.shape[-1]).to(dtype)


_FEW_TOKENS = 32
"""Up to so many a product of small bf16 matrices costs a CPU 2 to 5 times that of fp32 ones."""
_TOKENS_OF_SLOT = 4
"""On average; from so many on, a product a slot is faster than copies of its factors."""


def drop_input(x_NTI: torch.Tensor, rates: Sequence[float], routing: GroupRouting) -> torch.Tensor:
    """Drops input features while training, each slot's rows at its own rate."""
    if not (routing.streams and any(rates)):
        return x_NTI
    parts = []
    for x, p, stream in zip(
        x_NTI.split(list(routing.num_rows)), rates, routing.streams, strict=True
    ):
        shape = (x.shape[0], x.shape[1], x.shape[2])
        mask = keep_scale(stream, routing.site_index, shape, p, x.dtype) if p else None
        parts.append(x if mask is None else x * mask)
    return torch.cat(parts)
