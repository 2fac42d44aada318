"""One process, plain torch: an optimizer a slot."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from graft.engine.backends.base import OptimizerState
from graft.engine.backends.optimizers import make_optimizer, read_moments, write_moments
from graft.engine.lanes import in_lanes, num_lanes
from graft.recipe.sections import TrainSection


class TorchBackend:
    """Steps every slot with its own optimizer in this process."""

    world_size = 1
    world_rank = 0
    forwards_together = False
    takes_lanes = True

    def __init__(self) -> None:
        self._parameters: dict[str, dict[str, torch.nn.Parameter]] = {}
        self._optimizers: dict[str, torch.optim.Optimizer] = {}

    def attach(
        self,
        slot: str,
        parameters: dict[str, torch.nn.Parameter],
        settings: TrainSection,
        lr_scale: Callable[[str], float],
    ) -> None:
        """Makes the slot's optimizer."""
        self._parameters[slot] = parameters
        self._optimizers[slot] = make_optimizer(settings, groups_by_scale(parameters, lr_scale))

    def detach(self, slot: str) -> None:
        """Drops the slot's optimizer."""
        del self._parameters[slot], self._optimizers[slot]

    def forward_backward_count(self, local: int) -> int:
        """Alone, a worker runs just its own."""
        return local

    def backward(self, loss: torch.Tensor, *, is_last: bool) -> None:
        """Accumulates gradients."""
        loss.backward()

    def step(
        self,
        lrs: dict[str, float],
        max_grad_norms: dict[str, float],
        after: Callable[[str], None],
    ) -> dict[str, float]:
        """Clips and steps each named slot, on a CPU a core each."""

        def step_some(slots: Sequence[str]) -> dict[str, float]:
            return {
                slot: self._step_one(slot, lrs[slot], max_grad_norms[slot], after) for slot in slots
            }

        stepped = [slot for slot in self._optimizers if slot in lrs]
        lanes = num_lanes(self._device(stepped), len(stepped))
        found = in_lanes([partial(step_some, stepped[at::lanes]) for at in range(lanes)])
        for optimizer in self._optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        return {slot: norm for norms in found for slot, norm in norms.items()}

    def _device(self, slots: Sequence[str]) -> torch.device:
        of_slots = (p.device for slot in slots for p in self._parameters[slot].values())
        return next(of_slots, torch.device("cpu"))

    def _step_one(
        self, slot: str, lr: float, max_grad_norm: float, after: Callable[[str], None]
    ) -> float:
        optimizer = self._optimizers[slot]
        parameters = [p for p in self._parameters[slot].values() if p.requires_grad]
        gradients = [p.grad for p in parameters if p.grad is not None]
        total = torch.nn.utils.get_total_norm(gradients)
        norm = float(total)
        if norm + 1e-6 > max_grad_norm:  # else all would be read and written for a factor of 1
            torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, total)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        if math.isfinite(norm):
            optimizer.step()
            after(slot)
        return norm

    def all_reduce_sum(self, value: torch.Tensor) -> torch.Tensor:
        """Nothing to add."""
        return value

    def parameters(self, slot: str) -> dict[str, torch.Tensor]:
        """Copies of the slot's weights."""
        return {k: p.detach().cpu().clone() for k, p in self._parameters[slot].items()}

    def optimizer_state(self, slot: str) -> OptimizerState:
        """Copies of the slot's moments."""
        optimizer = self._optimizers[slot]
        return {
            key: read_moments(optimizer, parameter)
            for key, parameter in self._parameters[slot].items()
            if parameter in optimizer.state
        }

    def load_optimizer_state(self, slot: str, state: OptimizerState) -> None:
        """Puts moments back."""
        for key, moments in state.items():
            write_moments(self._optimizers[slot], self._parameters[slot][key], moments)


def groups_by_scale(
    parameters: dict[str, torch.nn.Parameter], lr_scale: Callable[[str], float]
) -> list[dict[str, Any]]:
    """Returns torch's parameter groups of what takes gradients, one a factor on the rate."""
    groups: dict[float, list[torch.nn.Parameter]] = {}
    for key, parameter in parameters.items():
        if parameter.requires_grad:
            groups.setdefault(lr_scale(key.rpartition(".")[2]), []).append(parameter)
    return [{"params": members, "lr_scale": scale} for scale, members in groups.items()]
