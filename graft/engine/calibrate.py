"""What the layers of the base see of training rows: for initial weights that look at data.

Shapes: P positions of real tokens, I in_features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graft.data.records import TokenRow
from graft.engine.batches import RoutedRow, micro_batches
from graft.engine.logprobs import batch_hidden
from graft.engine.multi import MultiAdapterModel

NUM_ROWS = 64
"""Rows read; the moments of a few thousand tokens are stable."""
MAX_TOKENS = 2048
"""Padded tokens of one forward pass."""


class _Moment:
    """Sums over one layer's inputs, taken from near their mean: less is lost to rounding."""

    def __init__(self, x_PI: torch.Tensor) -> None:
        self._near_I = x_PI.mean(dim=0)
        self._num = 0
        self._sum_I = torch.zeros_like(self._near_I)
        self._product_II = torch.zeros_like(self._near_I).outer(self._sum_I)

    def add(self, x_PI: torch.Tensor) -> None:
        away_PI = x_PI - self._near_I
        self._num += len(x_PI)
        self._sum_I += away_PI.sum(dim=0)
        self._product_II.addmm_(away_PI.T, away_PI)

    def covariance(self) -> torch.Tensor:
        mean_I = self._sum_I / self._num
        return self._product_II / self._num - mean_I.outer(mean_I)


class _Watch:
    """Pre-hooks of linear layers; those that see one and the same input share its moment."""

    def __init__(self) -> None:
        self.moments: dict[str, _Moment] = {}
        self.real_NT = torch.empty(0)
        self._owners: dict[str, str] = {}
        self._last: tuple[torch.Tensor, str] | None = None

    def hook(self, name: str) -> Any:
        def before(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0]
            if name not in self._owners:
                is_shared = self._last is not None and self._last[0] is x
                self._owners[name] = self._last[1] if self._last and is_shared else name
            self._last = (x, self._owners[name])
            if self._owners[name] == name:
                self._add(name, x)

        return before

    def _add(self, name: str, x: torch.Tensor) -> None:
        x_PI = x.reshape(-1, x.shape[-1])
        if len(x_PI) == self.real_NT.numel():  # an expert sees tokens picked for it instead
            x_PI = x_PI[self.real_NT.flatten()]
        if not len(x_PI):
            return
        x_PI = x_PI.to(torch.promote_types(x.dtype, torch.float32))
        if name not in self.moments:
            self.moments[name] = _Moment(x_PI)
        self.moments[name].add(x_PI)

    def covariances(self) -> dict[str, torch.Tensor]:
        own = {name: moment.covariance() for name, moment in self.moments.items()}
        return {name: own[owner] for name, owner in self._owners.items() if owner in own}


@torch.inference_mode()
def input_moments(
    model: MultiAdapterModel, sites: Sequence[str], rows: Sequence[TokenRow]
) -> dict[str, torch.Tensor]:
    """Runs the bare base over the first rows.

    Args:
        model: The base; its slots stay out of it.
        sites: Module paths; those that are no linear layer (an expert's slice) are passed over.
        rows: Training rows.

    Returns:
        For each site that saw a token the covariance of its inputs over the tokens,
        `[in_features, in_features]`, at least fp32; layers with one input share one tensor.
    """
    watch = _Watch()
    modules = {name: m for name, m in model.layers.modules.items() if name in set(sites)}
    handles = [m.register_forward_pre_hook(watch.hook(name)) for name, m in modules.items()]
    try:
        routed = [RoutedRow(None, row, at) for at, row in enumerate(rows[:NUM_ROWS])]
        for batch in micro_batches(
            routed, MAX_TOKENS, model.device, shares_prompts=model.shares_prompts
        ):
            mask = batch.attention_mask
            watch.real_NT = (torch.ones_like(batch.input_ids) if mask is None else mask).bool()
            batch_hidden(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return watch.covariances()
