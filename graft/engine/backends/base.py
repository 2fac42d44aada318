"""What steps the parameters: the training loop's only view of torch or DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from graft.recipe.sections import TrainSection

OptimizerState = dict[str, dict[str, "torch.Tensor"]]
"""Parameter name → `exp_avg`, `exp_avg_sq`, `step`, as whole tensors."""


class Backend(Protocol):
    """Owns optimizers and communication. One per process, called by the training loop only.

    The loop scales each micro-batch's loss so that gradients are to be *summed* over micro-batches
    and workers; a backend that averages has to undo it.
    """

    world_size: int
    world_rank: int
    forwards_together: bool
    """A forward pass is collective: all workers run the same number of them."""
    takes_lanes: bool
    """Micro-batches may run beside one another, their gradients added to `.grad` without
    `backward`."""

    def attach(
        self,
        slot: str,
        parameters: dict[str, torch.nn.Parameter],
        settings: TrainSection,
        lr_scale: Callable[[str], float],
    ) -> None:
        """Makes the optimizer of a slot that joins.

        Args:
            slot: Its name.
            parameters: All of its parameters, `site.tensor` → parameter; those that take
                gradients are stepped.
            settings: Of the optimizer.
            lr_scale: Factor on the learning rate by tensor name.
        """

    def detach(self, slot: str) -> None:
        """Drops the optimizer of a slot that leaves."""

    def forward_backward_count(self, local: int) -> int:
        """Returns how many micro-batches every worker must run this step (at least its own)."""

    def backward(self, loss: torch.Tensor, *, is_last: bool) -> None:
        """Accumulates gradients; `is_last` marks the step's last micro-batch."""

    def step(
        self,
        lrs: dict[str, float],
        max_grad_norms: dict[str, float],
        after: Callable[[str], None],
    ) -> dict[str, float]:
        """Clips each slot, steps it, clears gradients; returns the norms before clipping.

        Slots that are not named, or whose norm is not finite, keep their weights; gradients are
        cleared. `after` is called for each slot that was stepped, while its gradients still stand.
        """

    def all_reduce_sum(self, value: torch.Tensor) -> torch.Tensor:
        """Sums a small tensor over the workers."""

    def parameters(self, slot: str) -> dict[str, torch.Tensor]:
        """A slot's weights as whole tensors on the CPU."""

    def optimizer_state(self, slot: str) -> OptimizerState:
        """A slot's optimizer state as whole tensors on the CPU."""

    def load_optimizer_state(self, slot: str, state: OptimizerState) -> None:
        """Puts such a state back."""
