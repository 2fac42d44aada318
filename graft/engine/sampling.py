"""The next token of each row, greedy or drawn. Axes: N rows, V vocabulary."""

from __future__ import annotations

import torch


def next_tokens(
    logits_NV: torch.Tensor, settings: list[tuple[float, float, torch.Generator | None]]
) -> list[int | None]:
    """Picks one token a row.

    Args:
        logits_NV: Of the next token.
        settings: Each row's temperature, top_p and generator; no generator, the likeliest token.

    Returns:
        Token ids; None where a row's logits are not finite.
    """
    best_N, index_N = logits_NV.max(dim=-1)
    tokens: list[int | None] = index_N.tolist()
    is_finite = torch.isfinite(best_N).tolist()
    for row, (temperature, top_p, generator) in enumerate(settings):
        if not is_finite[row]:
            tokens[row] = None
        elif generator is not None:
            tokens[row] = _draw(logits_NV[row], temperature, top_p, generator)
    return tokens


def _draw(
    logits_V: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator
) -> int:
    # On the CPU, where a generator gives the same stream on every machine.
    logits_V = logits_V.float().cpu()
    # A tiny temperature makes all but the largest infinite, and that one 0.
    temperature = max(temperature, torch.finfo(logits_V.dtype).tiny)
    probabilities_V = torch.softmax((logits_V - logits_V.max()) / temperature, dim=-1)
    if top_p < 1:
        sorted_V, order_V = probabilities_V.sort(descending=True)
        # The smallest set whose mass reaches top_p, never empty (arXiv 1904.09751).
        sorted_V[sorted_V.cumsum(-1) - sorted_V >= top_p] = 0
        probabilities_V = torch.zeros_like(probabilities_V).scatter(0, order_V, sorted_V)
    # Where a uniform number falls among the summed probabilities: never on one that is 0.
    sums_V = probabilities_V.double().cumsum(-1)
    drawn = torch.rand(1, dtype=torch.float64, generator=generator) * sums_V[-1]
    return int(torch.searchsorted(sums_V, drawn, right=True).clamp(max=len(sums_V) - 1))
