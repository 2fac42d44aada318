"""The product that LoRA and its kin share, for the rows of several slots at once.

Shapes: S slots, N rows, T tokens, I in_features, O out_features, R rank (the largest of the slots).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graft.methods._dropout import keep_scale
from graft.methods.routing import GroupRouting


def low_rank_product(
    x_NTI: torch.Tensor, a_SIR: torch.Tensor, b_SRO: torch.Tensor, routing: GroupRouting
) -> torch.Tensor:
    """Two batched products: over slots where all have as many rows, else over rows."""
    num_slots = len(routing.slots)
    rows, tokens, width = x_NTI.shape
    if len(set(routing.num_rows)) == 1:
        x_SMI = x_NTI.reshape(num_slots, rows // num_slots * tokens, width)
        return (x_SMI @ a_SIR @ b_SRO).view(rows, tokens, b_SRO.shape[-1])
    slot_N = routing.slot_of_row(x_NTI.device)
    return x_NTI @ a_SIR[slot_N] @ b_SRO[slot_N]


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
