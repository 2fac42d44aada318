"""The optimizers of `train.optimizer`, and their moments as whole fp32 tensors.

All are AdamW (arXiv 1711.05101). bitsandbytes keeps moments in 8 bits, in blocks of 256 with a
scale each (arXiv 2110.02861), or in pages that leave the GPU when its memory runs short
(arXiv 2305.14314). Checkpoints hold fp32 moments whatever the optimizer, so a run goes on with
another one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

if TYPE_CHECKING:
    from graft.recipe.sections import TrainSection

_CLASSES = {
    "adamw_8bit": "AdamW8bit",
    "paged_adamw": "PagedAdamW",
    "paged_adamw_8bit": "PagedAdamW8bit",
}
_MOMENTS = {"exp_avg": "1", "exp_avg_sq": "2"}
"""Name in a checkpoint → bitsandbytes' number of the state."""
_BLOCK = 256


def make_optimizer(settings: TrainSection, groups: list[dict[str, Any]]) -> Optimizer:
    """Makes the optimizer of one slot.

    Args:
        settings: Of the optimizer.
        groups: torch's parameter groups.
    """
    shared: dict[str, Any] = {
        "lr": settings.lr,
        "betas": settings.betas,
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, **shared, fused=True)
    import bitsandbytes

    made: Optimizer = getattr(bitsandbytes.optim, _CLASSES[settings.optimizer])(groups, **shared)
    return made


def read_moments(optimizer: Optimizer, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """Copies a parameter's `exp_avg`, `exp_avg_sq` and `step` to the CPU; empty before step 1."""
    state = optimizer.state.get(parameter, {})
    if "state1" not in state:
        return {name: value.detach().cpu().clone() for name, value in state.items()}
    moments = {name: _unpacked(state, number) for name, number in _MOMENTS.items()}
    return {"step": torch.tensor(float(state["step"])), **moments}


def write_moments(
    optimizer: Optimizer, parameter: torch.Tensor, moments: dict[str, torch.Tensor]
) -> None:
    """Puts such moments back."""
    if isinstance(optimizer, torch.optim.AdamW):
        # A fused optimizer keeps its step count beside the moments.
        optimizer.state[parameter] = {
            name: value.to(parameter.device, copy=True) for name, value in moments.items()
        }
        return
    held: Any = optimizer
    for group_index, group in enumerate(held.param_groups):
        for index, member in enumerate(group["params"]):
            if member is parameter:
                held.init_state(group, parameter, group_index, index)
    state = optimizer.state[parameter]
    state["step"] = round(float(moments["step"]))
    for name, number in _MOMENTS.items():
        _pack(state, number, moments[name].to(parameter.device))


def _unpacked(state: dict[str, Any], number: str) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_blockwise

    kept: torch.Tensor = state[f"state{number}"]
    if kept.dtype == torch.uint8:
        kept = dequantize_blockwise(
            kept, absmax=state[f"absmax{number}"], code=state[f"qmap{number}"], blocksize=_BLOCK
        )
    return kept.detach().cpu().clone()


def _pack(state: dict[str, Any], number: str, moment: torch.Tensor) -> None:
    from bitsandbytes.functional import quantize_blockwise

    kept: torch.Tensor = state[f"state{number}"]
    if kept.dtype == torch.uint8:
        moment, constants = quantize_blockwise(
            moment, code=state[f"qmap{number}"], blocksize=_BLOCK
        )
        state[f"absmax{number}"].copy_(constants.absmax)
    kept.copy_(moment)
