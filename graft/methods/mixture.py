"""A mixture of LoRA experts: each layer has several low-rank updates and a gate that weighs them.

For tasks that pull one LoRA in different directions. The gate is a linear layer on the adapted
layer's own input, so each token has its own weights. There is no loss that balances the experts'
load over a batch: it would tie rows of a batch together, and a row's gradient must not depend on
its neighbours. The load is measured instead and stands in every report (`method/expert_load_0`).

Shapes: S slots, N rows, T tokens, I in_features, O out_features, K experts, R rank of one expert,
M positions of one slot (rows times tokens).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from graft.core.model import Listed
from graft.core.spaces import Choice, Float, Space
from graft.methods._own_files import OwnFilesMethod
from graft.methods.base import METHODS, Method, Site
from graft.methods.layerwise import FrozenLayer
from graft.methods.targets import require_rank_fits, select_sites

if TYPE_CHECKING:
    import torch

    from graft.methods.routing import GroupRouting

_TENSORS = ("experts_A", "experts_B", "gate_weight", "gate_bias")


@METHODS.register
class MixtureMethod(OwnFilesMethod):
    """Several LoRA experts a layer, weighed by a learned gate.

    Reference:
        Mixture of LoRA Experts, arXiv 2404.13628; the gate on each layer's input as in LoRAMoE,
        arXiv 2312.09979, and MoELoRA, arXiv 2402.12851.
    """

    type: Literal["mixture"] = "mixture"
    num_experts: int = Field(4, ge=1)
    """LoRA experts of each adapted layer."""
    r: int = Field(8, ge=1)
    """Rank of one expert."""
    lora_alpha: float = Field(16.0, gt=0)
    """Each expert's update is scaled by lora_alpha / r."""
    top_k: int | None = Field(None, ge=1)
    """Experts that take part for a token, the likeliest ones; None means all."""
    target_modules: Literal["all-linear"] | Listed[str] = "all-linear"
    """Layers to adapt: `all-linear`, or endings of module paths."""

    packable: ClassVar[bool] = True
    servable: ClassVar[frozenset[str]] = frozenset({"native"})
    quantized_base: ClassVar[frozenset[str]] = frozenset({"int8", "nf4"})
    zero_stages: ClassVar[frozenset[int]] = frozenset({0, 1, 2, 3})
    tensor_names: ClassVar[tuple[str, ...]] = _TENSORS

    @model_validator(mode="after")
    def top_k_is_within_the_experts(self) -> MixtureMethod:
        """Refuses to pick more experts than there are."""
        if self.top_k is not None and self.top_k > self.num_experts:
            raise ValueError(
                f"top_k {self.top_k} is above num_experts {self.num_experts}; "
                f"use at most {self.num_experts}, or null for all"
            )
        return self

    @classmethod
    def search_space(cls) -> dict[str, Space]:
        """Experts against their rank, and the learning rate."""
        return {
            "method.num_experts": Choice(values=(2, 4, 8)),
            "method.r": Choice(values=(4, 8, 16)),
            "train.lr": Float(low=5e-5, high=5e-3, log=True),
        }

    def sites(self, linears: dict[str, tuple[int, int]]) -> tuple[Site, ...]:
        """Picks the target layers.

        Raises:
            ConfigError: A target matches nothing, or `r` exceeds a layer's smaller side.
        """
        sites = select_sites(linears, self.target_modules)
        require_rank_fits(sites, self.r, field="r")
        return sites

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        """Experts one after another: A `[num_experts * r, in]`, B `[out, num_experts * r]`."""
        return {
            "experts_A": (self.num_experts * self.r, site.in_features),
            "experts_B": (site.out_features, self.num_experts * self.r),
            "gate_weight": (self.num_experts, site.in_features),
            "gate_bias": (self.num_experts,),
        }

    def init(
        self, site: Site, generator: torch.Generator, layer: FrozenLayer
    ) -> dict[str, torch.Tensor]:
        """Each expert as a LoRA, B zero; the gate uniform in ±1/sqrt(in_features), bias zero."""
        import torch

        bound = 1.0 / math.sqrt(site.in_features)
        shapes = self.shapes(site)

        def drawn(name: str) -> torch.Tensor:
            return torch.empty(shapes[name]).uniform_(-bound, bound, generator=generator)

        return {
            "experts_A": drawn("experts_A"),
            "experts_B": torch.zeros(shapes["experts_B"]),
            "gate_weight": drawn("gate_weight"),
            "gate_bias": torch.zeros(shapes["gate_bias"]),
        }

    @classmethod
    def stack(
        cls,
        slots: list[dict[str, torch.Tensor]],
        methods: tuple[Method, ...],
        dtype: torch.dtype,
        layer: FrozenLayer,
    ) -> dict[str, torch.Tensor]:
        """Pads to the most experts and the largest rank; a gate never opens to a padded expert."""
        import torch
        from torch.nn.functional import pad

        ours = [m for m in methods if isinstance(m, MixtureMethod)]
        most, widest = max(m.num_experts for m in ours), max(m.r for m in ours)

        def experts(tensor_EF: torch.Tensor, m: MixtureMethod) -> torch.Tensor:
            by_expert_KRF = tensor_EF.unflatten(0, (m.num_experts, m.r))
            missing = (0, 0, 0, widest - m.r, 0, most - m.num_experts)
            return pad(by_expert_KRF, missing).flatten(0, 1)

        pairs = list(zip(slots, ours, strict=True))
        a_SEI = torch.stack([experts(t["experts_A"], m) for t, m in pairs])
        b_SEO = torch.stack([experts(t["experts_B"].T, m) * (m.lora_alpha / m.r) for t, m in pairs])
        gate_SKI = torch.stack(
            [pad(t["gate_weight"], (0, 0, 0, most - m.num_experts)) for t, m in pairs]
        )
        bias_SK = torch.stack(
            [pad(t["gate_bias"], (0, most - m.num_experts), value=-math.inf) for t, m in pairs]
        )
        return {
            "a_SIE": a_SEI.to(dtype).transpose(1, 2),
            "b_SEO": b_SEO.to(dtype),
            "gate_SIK": gate_SKI.to(dtype).transpose(1, 2),
            "bias_SK": bias_SK,
            "top_S": torch.tensor([m.top_k or m.num_experts for m in ours], device=bias_SK.device),
        }

    @classmethod
    def delta(
        cls,
        x_NTI: torch.Tensor,
        base_NTO: torch.Tensor,
        stacked: dict[str, torch.Tensor],
        routing: GroupRouting,
    ) -> torch.Tensor:
        """As LoRA's, with the gate's weights between A and B: over slots, or over rows."""
        num_slots = len(routing.slots)
        rows, tokens, width = x_NTI.shape
        if len(set(routing.num_rows)) == 1:
            x_SMI = x_NTI.reshape(num_slots, rows // num_slots * tokens, width)
            out, weight = _mixed(x_SMI, stacked)
        else:
            slot_N = routing.slot_of_row(x_NTI.device)
            out, weight = _mixed(x_NTI, {name: value[slot_N] for name, value in stacked.items()})
        if routing.observed is not None:
            _tell_load(weight.reshape(rows, tokens, -1), routing)
        return out.reshape(rows, tokens, -1)


def _mixed(
    x_SMI: torch.Tensor, stacked: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the update and the gate's weights, `[S, M, O]` and `[S, M, K]`."""
    import torch

    logits_SMK = x_SMI @ stacked["gate_SIK"]
    bias_SK = stacked["bias_SK"]
    logits_SMK = logits_SMK.to(torch.promote_types(bias_SK.dtype, torch.float32))
    logits_SMK = logits_SMK + bias_SK[:, None]
    num_experts = bias_SK.shape[-1]
    top_S = stacked["top_S"]
    if bool((top_S < num_experts).any()):
        order_SMK = logits_SMK.argsort(dim=-1, descending=True, stable=True)
        place_SMK = order_SMK.argsort(dim=-1)
        logits_SMK = logits_SMK.masked_fill(place_SMK >= top_S[:, None, None], -math.inf)
    weight_SMK = logits_SMK.softmax(dim=-1)
    low_SME = x_SMI @ stacked["a_SIE"]
    rank = low_SME.shape[-1] // num_experts
    gated_SME = low_SME * weight_SMK.to(low_SME.dtype).repeat_interleave(rank, dim=-1)
    return gated_SME @ stacked["b_SEO"], weight_SMK


def _tell_load(weight_NTK: torch.Tensor, routing: GroupRouting) -> None:
    """Leaves each row's mean weight of every expert, and of the expert that has most of the row."""
    load_NK = routing.mean_over_tokens(weight_NTK)
    for slot, method, part_NK in zip(
        routing.slots, routing.methods, load_NK.split(list(routing.num_rows)), strict=True
    ):
        assert isinstance(method, MixtureMethod)
        own_NK = part_NK[:, : method.num_experts]
        routing.observe(slot, "expert_load", own_NK)
        routing.observe(slot, "top_expert_load", own_NK.amax(1, keepdim=True))
