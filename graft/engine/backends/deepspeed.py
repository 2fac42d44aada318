"""DeepSpeed under the training loop: one adapter, many workers, ZeRO stages 0 to 3.

DeepSpeed sees the adapter's fp32 parameters only, and under ZeRO-3 (arXiv 1910.02054) the base as
well, which it then partitions. So the base keeps its own dtype, and DeepSpeed runs in plain fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graft.core.errors import TrainingError
from graft.engine.backends.base import OptimizerState
from graft.engine.backends.buckets import max_live, prefetch_bucket, reduce_bucket
from graft.engine.backends.nvme import keep_told_dtype, swap_folder
from graft.engine.backends.ops import import_deepspeed, load_ops, ops_of
from graft.engine.backends.optimizers import make_optimizer, read_moments, write_moments
from graft.engine.backends.torch import groups_by_scale
from graft.engine.multi import MultiAdapterModel
from graft.engine.multi.layer import RoutedLinear
from graft.engine.multi.lower_layers import decoder_layers
from graft.recipe.sections import ScaleSection, TrainSection

_MOMENTS = ("exp_avg", "exp_avg_sq")


class _Managed(nn.Module):
    """What DeepSpeed is given as its model; the loop runs the real forward pass itself.

    The loss passes through `forward`, where DeepSpeed's hooks learn that a backward pass is coming.
    """

    def __init__(self, adapter: Iterable[nn.Parameter], base: nn.Module | None) -> None:
        super().__init__()
        # First, because DeepSpeed takes its working dtype from the first parameter.
        self.adapter = nn.ParameterList(adapter)
        self.base = base

    def forward(self, loss: torch.Tensor) -> torch.Tensor:
        return loss


class DeepSpeedBackend:
    """Steps one slot with DeepSpeed in each of several processes.

    The process group must exist, and every method that touches parameters or optimizer state is
    collective: all workers call it, in the same order.

    Args:
        model: The base.
        scale: Stage and offload.
        persistence_threshold: Numbers of a weight that ZeRO-3 leaves whole on every worker; None
            leaves those below 100,000, and of a small base those below a thousandth of it.
    """

    def __init__(
        self,
        model: MultiAdapterModel,
        scale: ScaleSection,
        *,
        persistence_threshold: int | None = None,
    ) -> None:
        self._deepspeed = import_deepspeed()
        self._deepspeed.init_distributed(
            dist_backend="nccl" if model.device.type == "cuda" else "gloo",
            auto_mpi_discovery=False,
        )
        self.world_size: int = torch.distributed.get_world_size()
        self.world_rank: int = torch.distributed.get_rank()
        self.forwards_together = scale.zero_stage == 3
        self.takes_lanes = False
        self._model = model
        self._scale = scale
        self._persistence_threshold = persistence_threshold
        self._engine: Any = None
        self._slot = ""
        self._all: dict[str, nn.Parameter] = {}
        self._parameters: dict[str, nn.Parameter] = {}
        self._lr_scales: list[float] = []
        self._num_steps = 0
        self._norm = math.nan
        self._after: Callable[[str], None] | None = None

    def attach(
        self,
        slot: str,
        parameters: dict[str, nn.Parameter],
        settings: TrainSection,
        lr_scale: Callable[[str], float],
    ) -> None:
        """Makes the slot's DeepSpeed engine; under ZeRO-3 the base is partitioned now.

        Raises:
            TrainingError: Another slot is attached, or the base computes in fp64.
            MissingDependencyError: Offload needs an op that is not built.
        """
        if self._engine is not None:
            raise TrainingError(
                f"DeepSpeed trains one adapter a run and has {self._slot!r}; "
                f"{slot!r} needs a run of its own"
            )
        if self._model.dtype == torch.float64:
            raise TrainingError("DeepSpeed steps in fp32 at most; set model.dtype to fp32 or bf16")
        load_ops(ops_of(self._scale))
        is_partitioned = self._scale.zero_stage == 3
        if is_partitioned and self._model.layers.adapts_experts:
            # Stage 3 gathers weights of a module that is called; single experts are read in slices.
            raise TrainingError(
                "single experts and routers do not train under scale.zero_stage 3; use 2, or leave "
                "them out of method.target_modules"
            )
        self._slot, self._all = slot, parameters
        self._parameters = {key: p for key, p in parameters.items() if p.requires_grad}
        groups = groups_by_scale(parameters, lr_scale)
        self._lr_scales = [group.pop("lr_scale") for group in groups]
        is_divided = self._scale.zero_stage > 0
        self._engine, _, _, _ = self._deepspeed.initialize(
            model=_Managed(self._parameters.values(), self._model.base if is_partitioned else None),
            model_parameters=groups if is_divided else None,
            optimizer=None if is_divided else make_optimizer(settings, groups),
            config=self._config(settings),
        )
        self._num_steps = 0
        if is_partitioned:
            self._gather_with_adapters()
        if self._scale.zero_stage == 0:
            self._clip_in_optimizer(settings.max_grad_norm)

    def _gather_with_adapters(self) -> None:
        """Methods may read the weight of the layer that they adapt, as DoRA does for its lengths.

        So it is there for as long as the adapter's own tensors are.
        """
        for module in self._model.base.modules():
            if isinstance(module, RoutedLinear):
                for parameter in module.base.parameters():
                    self._deepspeed.zero.register_external_parameter(module, parameter)

    def _config(self, settings: TrainSection) -> dict[str, Any]:
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            # `step` alone is the boundary, so a step may have any number of micro-batches.
            "managed_gradient_accumulation": False,
            "steps_per_print": None,
        }
        if self._scale.zero_stage == 0:
            # Unsaid, it would be 1: a clip of DeepSpeed's own before the one in the optimizer.
            return config | {"gradient_clipping": 0.0}
        optimizer: dict[str, Any] = {
            "lr": settings.lr,
            "betas": list(settings.betas),
            "eps": settings.eps,
            "weight_decay": settings.weight_decay,
        }
        if self._scale.offload.optimizer == "none":
            optimizer["torch_adam"] = True
        bucket = reduce_bucket(sum(p.numel() for p in self._parameters.values()))
        zero: dict[str, Any] = {
            "stage": self._scale.zero_stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            **self._gathering(),
            **self._offload(),
        }
        return config | {
            "gradient_clipping": settings.max_grad_norm,
            "optimizer": {"type": "AdamW", "params": optimizer},
            "zero_optimization": zero,
        }

    def _gathering(self) -> dict[str, Any]:
        """What stage 3 leaves whole, holds and fetches ahead."""
        if self._scale.zero_stage < 3:
            return {}
        # A base that is partitioned already tells its whole size as `ds_numel`.
        weights = self._model.base.parameters()
        num_weights = sum(getattr(p, "ds_numel", p.numel()) for p in weights)
        threshold = self._persistence_threshold
        if threshold is None:
            # DeepSpeed's own 100,000 would leave every weight of a small base whole.
            threshold = min(100_000, num_weights // 1000)
        return {
            "stage3_param_persistence_threshold": threshold,
            "stage3_max_live_parameters": max_live(num_weights),
            "stage3_max_reuse_distance": max_live(num_weights),
            "stage3_prefetch_bucket_size": prefetch_bucket(num_weights),
        }

    def _offload(self) -> dict[str, Any]:
        offload = self._scale.offload
        targets = {"offload_optimizer": offload.optimizer, "offload_param": offload.parameters}
        config: dict[str, Any] = {}
        for key, device in targets.items():
            if device != "none":
                config[key] = {"device": device}
        on_disk = [key for key, device in targets.items() if device == "nvme"]
        if on_disk:
            assert offload.nvme_path is not None  # the section refuses nvme without it
            folder = swap_folder(Path(offload.nvme_path), self)
            for key in on_disk:
                config[key]["nvme_path"] = str(folder)
        if offload.parameters == "nvme":
            keep_told_dtype()
            # DeepSpeed's own buffers are made for 100 million numbers, 2 GB in all.
            config["offload_param"]["buffer_size"] = self._largest_share()
            if self._scale.gradient_checkpointing:
                # A layer that is computed again has all its weights at once; DeepSpeed has 5.
                config["offload_param"]["buffer_count"] = max(5, self._most_in_a_layer())
            # Its look-ahead asks for a weight twice where a layer's two passes are near each other.
            config["stage3_prefetch_bucket_size"] = 0
            config["stage3_max_reuse_distance"] = 0
        return config

    def _largest_share(self) -> int:
        """Numbers of the largest tensor that a worker holds its part of."""
        sizes = [p.numel() for p in (*self._model.base.parameters(), *self._parameters.values())]
        return int(-(-max(sizes) // self.world_size))

    def _most_in_a_layer(self) -> int:
        """Tensors of the decoder layer that has most."""
        layers = decoder_layers(self._model.base)
        return max(len(list(layer.parameters())) for layer in layers)

    def _clip_in_optimizer(self, max_grad_norm: float) -> None:
        """Stage 0 clips here: DeepSpeed's own clip keeps the norm to itself and steps on NaN."""

        def clip(*_: Any) -> None:
            parameters = list(self._parameters.values())
            norm = float(nn.utils.clip_grad_norm_(parameters, max_grad_norm))
            self._norm = norm
            if not math.isfinite(norm):
                for parameter in parameters:
                    parameter.grad = None

        def tell(*_: Any) -> None:
            if self._after is not None and math.isfinite(self._norm):
                self._after(self._slot)

        self._engine.optimizer.register_step_pre_hook(clip)
        self._engine.optimizer.register_step_post_hook(tell)

    def detach(self, slot: str) -> None:
        """Ends the engine. Under ZeRO-3 the base stays partitioned: the process should end too."""
        self._engine.destroy()
        self._engine = None
        self._parameters = self._all = {}

    def forward_backward_count(self, local: int) -> int:
        """The largest count of any worker."""
        count = torch.tensor(local, device=self._model.device)
        torch.distributed.all_reduce(count, op=torch.distributed.ReduceOp.MAX)
        return int(count)

    def backward(self, loss: torch.Tensor, *, is_last: bool) -> None:
        """Accumulates gradients; DeepSpeed averages over workers, the factor makes that a sum."""
        self._engine.backward(self._engine(loss * self.world_size))

    def step(
        self,
        lrs: dict[str, float],
        max_grad_norms: dict[str, float],
        after: Callable[[str], None],
    ) -> dict[str, float]:
        """Steps with DeepSpeed, clipped to the `max_grad_norm` that the slot was attached with.

        Where the norm is not finite DeepSpeed skips the update; a slot without a rate steps by 0.
        """
        if self._engine is None:
            return {}
        groups = self._engine.optimizer.param_groups
        for group, scale in zip(groups, self._lr_scales, strict=True):
            group["lr"] = lrs.get(self._slot, 0.0) * scale
        self._after = after if self._slot in lrs else None
        self._engine.step()
        if self._scale.zero_stage:
            self._norm = float(self._engine.get_global_grad_norm())
        self._num_steps += math.isfinite(self._norm)
        return {self._slot: self._norm} if self._slot in lrs else {}

    def all_reduce_sum(self, value: torch.Tensor) -> torch.Tensor:
        """Sums over the workers."""
        summed = value.detach().to(self._model.device, copy=True)
        torch.distributed.all_reduce(summed)
        return summed.to(value.device)

    def parameters(self, slot: str) -> dict[str, torch.Tensor]:
        """Whole weights, gathered under ZeRO-3. Collective."""
        from deepspeed.utils import safe_get_full_fp32_param

        if self._scale.zero_stage < 3:
            return {k: p.detach().cpu().clone() for k, p in self._all.items()}
        whole = {k: safe_get_full_fp32_param(p).cpu() for k, p in self._parameters.items()}
        frozen = {k: p for k, p in self._all.items() if k not in whole}
        with self._deepspeed.zero.GatheredParameters(list(frozen.values())):
            whole |= {k: p.detach().cpu().clone() for k, p in frozen.items()}
        return {key: whole[key] for key in self._all}

    def optimizer_state(self, slot: str) -> OptimizerState:
        """Whole moments and step count of every parameter; empty before step 1. Collective."""
        if self._num_steps == 0:
            return {}
        if self._scale.zero_stage == 0:
            optimizer = self._engine.optimizer
            return {key: read_moments(optimizer, p) for key, p in self._parameters.items()}
        from deepspeed.utils import safe_get_full_optimizer_state as whole

        return {
            key: {
                "step": torch.tensor(float(self._num_steps)),
                **{name: whole(p, name).detach().cpu().clone() for name in _MOMENTS},
            }
            for key, p in self._parameters.items()
        }

    def load_optimizer_state(self, slot: str, state: OptimizerState) -> None:
        """Puts whole moments back, divided as this run divides them. Collective."""
        if not state:
            return
        self._num_steps = round(float(next(iter(state.values()))["step"]))
        if self._scale.zero_stage == 0:
            for key, parameter in self._parameters.items():
                write_moments(self._engine.optimizer, parameter, state[key])
            return
        self._make_moments()
        for key, parameter in self._parameters.items():
            for name in _MOMENTS:
                self._set_moments(parameter, state[key][name].to(self._model.device), name)
        # ZeRO's optimizers hold torch's own inside; the step count lives there.
        for held in self._engine.optimizer.optimizer.state.values():
            if torch.is_tensor(held["step"]):
                held["step"].fill_(float(self._num_steps))
            else:
                held["step"] = self._num_steps

    def _set_moments(self, parameter: Any, value: torch.Tensor, name: str) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self._scale.zero_stage < 3:
            safe_set_full_optimizer_state(parameter, value, name)
            return
        # Stage 3 pads the last worker's part; DeepSpeed's own division of a whole tensor does not.
        share = parameter.ds_tensor.numel()
        padded = nn.functional.pad(value.flatten(), (0, share * self.world_size - value.numel()))
        part = padded.narrow(0, share * self.world_rank, share)
        safe_set_local_optimizer_state(parameter, part, name)

    def _make_moments(self) -> None:
        """DeepSpeed makes moments at its first step; with rate and gradients 0, only them."""
        parameters = list(self._parameters.values())
        with self._deepspeed.zero.GatheredParameters(parameters):
            nothing = torch.stack([p.sum() for p in parameters]).sum() * 0.0
            self.backward(nothing, is_last=True)
        num_steps = self._num_steps
        self.step({}, {}, lambda _: None)
        self._num_steps = num_steps
