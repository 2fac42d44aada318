"""Which rows belong to which slot, inside one forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from graft.methods.base import Method


@dataclass(frozen=True)
class DropoutStream:
    """Where a slot's dropout masks come from: a counter, not a generator state.

    A mask value depends on (seed, step, global row, token, site, feature) alone, so packing,
    padding, micro-batches, recomputation and world size cannot change it.
    """

    seed: int
    step: int
    rows: torch.Tensor
    """Global row index in the step's batch of this slot, `[rows]`, int64."""
    columns: torch.Tensor | None = None
    """Which token of its row each one is, `[rows, tokens]`, int64; None counts from 0."""


Observed = dict[tuple[str, str], list["torch.Tensor"]]
"""Figures that methods tell of themselves: (slot, name) → `[rows, figures]` a layer and pass."""


@dataclass(frozen=True)
class GroupRouting:
    """The slots of one method in one forward pass, and their rows in order."""

    slots: tuple[str, ...]
    methods: tuple[Method, ...]
    """Each slot's settings."""
    num_rows: tuple[int, ...]
    """Rows of each slot; rows stand in slot order."""
    site_index: int = 0
    """Position of the layer among the base's linear layers; a part of the dropout counter."""
    streams: tuple[DropoutStream, ...] = ()
    """One a slot while training; empty when evaluating, and then nothing is dropped."""
    observed: Observed | None = None
    """Where to leave figures; None where nobody asks."""
    real: torch.Tensor | None = None
    """Which tokens are no padding, `[rows, tokens]`; None: all. Known where figures are asked."""

    def observe(self, slot: str, name: str, figures_NF: torch.Tensor) -> None:
        """Leaves figures of each row of a slot, `[rows, figures]`, where somebody asks."""
        if self.observed is not None:
            self.observed.setdefault((slot, name), []).append(figures_NF.detach())

    def mean_over_tokens(self, values_NTF: torch.Tensor) -> torch.Tensor:
        """Returns each row's mean over its tokens without padding, `[rows, figures]`."""
        if self.real is None:
            return values_NTF.mean(1)
        real_NT1 = self.real[:, :, None].to(values_NTF)
        return (values_NTF * real_NT1).sum(1) / real_NT1.sum(1)

    def slot_of_row(self, device: torch.device) -> torch.Tensor:
        """Returns each row's position in `slots`, `[rows]`, int64."""
        import torch

        of_rows = [at for at, rows in enumerate(self.num_rows) for _ in range(rows)]
        return torch.tensor(of_rows, device=device)
