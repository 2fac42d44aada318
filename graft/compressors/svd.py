"""Rank reduction: the best approximation of each low-rank update by one of smaller rank.

The singular value decomposition of `B A` is taken through the QR factors of B and of A transposed,
so that nothing larger than the factors is formed. Of all updates of that rank the result is the
nearest in the Frobenius norm (Eckart and Young). Use it first: a searched rank is often more than
is needed.

Shapes: I in_features, O out_features, R rank of the adapter, K rank kept.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from graft.compressors.base import COMPRESSORS, Adapter, Compressor
from graft.core.errors import CompressionError

if TYPE_CHECKING:
    import torch

    from graft.methods.lora import LoraMethod


@COMPRESSORS.register
class SvdCompressor(Compressor):
    """Truncated SVD of every site's update; all sites keep one rank, as vLLM demands.

    Reference:
        The approximation of one matrix by another of lower rank, Eckart and Young, 1936; for LoRA,
        LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685, section 7.2.
    """

    type: Literal["svd"] = "svd"
    r: int = Field(4, ge=1)
    """Rank kept, at most. An adapter whose rank is no larger stays as it is."""
    share: float | None = Field(None, gt=0, le=1)
    """Keep at most this share of the adapter's own rank as well: for a rank that is searched."""
    energy: float | None = Field(None, gt=0, le=1)
    """Keep only as many ranks below `r` as every site needs for this share of its squared norm."""

    def compress(self, adapter: Adapter) -> Adapter:
        """Returns the adapter at rank `r` or below, its scale `lora_alpha / r` unchanged.

        Raises:
            CompressionError: Not a LoRA, or its values are not finite.
        """
        method, pairs = _lora(adapter).plain(adapter.tensors)
        adapter = Adapter(method, pairs) if method is not adapter.method else adapter
        kept = min(self.r, method.r)
        if self.share is not None:
            kept = min(kept, max(1, int(self.share * method.r)))
        if kept == method.r and self.energy is None:
            return adapter
        factors = {site: _decompose(site, pair) for site, pair in adapter.tensors.items()}
        if self.energy is not None:
            needed = (_rank_for(s, self.energy) for _, s, _ in factors.values())
            kept = min(kept, max(needed, default=1))
        if kept == method.r:
            return adapter
        tensors = {
            site: _balanced(left[:, :kept], values[:kept], right[:kept])
            for site, (left, values, right) in factors.items()
        }
        alpha = method.scale * (math.sqrt(kept) if method.use_rslora else kept)
        smaller = type(method).model_validate(
            {**method.model_dump(), "r": kept, "lora_alpha": alpha}
        )
        return Adapter(smaller, tensors)


def _lora(adapter: Adapter) -> LoraMethod:
    from graft.methods.lora import LoraMethod

    if not isinstance(adapter.method, LoraMethod):
        raise CompressionError(
            f"compress svd: needs an adapter of method lora, this one is {adapter.method.type!r}; "
            "remove svd from the recipe's compress list"
        )
    return adapter.method


def _decompose(
    site: str, pair: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns `[O, R]`, `[R]`, `[R, I]` in fp64, whose product is `B A`."""
    import torch

    b_OR, a_RI = pair["lora_B"].double(), pair["lora_A"].double()
    if not (b_OR.isfinite().all() and a_RI.isfinite().all()):
        raise CompressionError(f"compress svd: {site} holds NaN or infinity; nothing is compressed")
    q_OR, r_RR = torch.linalg.qr(b_OR)
    p_IR, s_RR = torch.linalg.qr(a_RI.T)
    u_RR, values_R, v_RR = torch.linalg.svd(r_RR @ s_RR.T)
    return q_OR @ u_RR, values_R, v_RR @ p_IR.T


def _rank_for(values_R: torch.Tensor, energy: float) -> int:
    import torch

    total = (values_R**2).sum()
    if total == 0:
        return 1
    shares = (values_R**2).cumsum(0) / total
    # A share that rounding leaves an ulp short of 1 must not ask for one rank more than there is.
    reached = torch.searchsorted(shares, energy * (1 - 1e-12))
    return min(int(reached) + 1, len(values_R))


def _balanced(
    left_OK: torch.Tensor, values_K: torch.Tensor, right_KI: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Splits the singular values evenly, so that both factors quantize equally well."""
    root_K = values_K.sqrt()
    return {
        "lora_A": (root_K[:, None] * right_KI).float().contiguous(),
        "lora_B": (left_OK * root_K).float().contiguous(),
    }
