"""Mixture-of-experts bases: adapters on single experts and on the router.

transformers keeps the experts of a layer as slices of fused parameters and the router in a class of
its own, so neither is a linear layer that could be wrapped. Here they are layers by name all the
same: `model.layers.0.mlp.experts.3.down_proj`, `model.layers.0.mlp.gate`. Each token keeps its slot
through the dispatch; the frozen product of an expert is computed once for the tokens of all slots.

Shapes: M tokens of all rows, K experts picked a token, P pairs of a token and a picked expert (all,
or those of one expert), I in_features, O out_features, E experts.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from graft.engine.multi.frozen import is_linear
from graft.engine.multi.layer import ActiveRouting, SlotTensors
from graft.methods.base import FusedSize
from graft.methods.layerwise import LayerMethod
from graft.methods.routing import GroupRouting

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from graft.engine.multi.frozen import FrozenLinear
    from graft.engine.multi.model import Slot

_PROJECTIONS = ("gate_up_proj", "down_proj")


class FusedWeight(nn.Module):
    """One expert's projection, or a router, looked at as a linear layer; in no module tree.

    Args:
        module: The experts' module, or the router.
        path: Its path.
        projection: The name of the parameter.
        expert: Which slice of it; None for a router.
    """

    bias = None

    def __init__(self, module: nn.Module, path: str, projection: str, expert: int | None) -> None:
        super().__init__()
        self.module = module
        self.path = path
        self.projection = projection
        self.expert = expert

    @property
    def weight(self) -> torch.Tensor:
        """`[out_features, in_features]`, the module's own: to write to it writes to the module."""
        weight: torch.Tensor = getattr(self.module, self.projection)
        return weight if self.expert is None else weight[self.expert]


def fused_weights(base: nn.Module) -> dict[str, FusedWeight]:
    """Finds the experts' projections and the routers of a base on which nothing is wrapped.

    Returns:
        By name: `model.layers.0.mlp.experts.3.down_proj`, or a router's path.
    """
    found: dict[str, FusedWeight] = {}
    for path, module in base.named_modules():
        for name, child in module.named_children():
            if _is_fused_experts(child):
                found |= _experts_of(child, f"{path}.{name}")
                found |= _routers_beside(module, path, child)
    return found


def _is_fused_experts(module: nn.Module) -> bool:
    """The one layout that is adapted: `[experts, out, in]`, gated, no bias; nearly all have it."""
    return (
        all(isinstance(getattr(module, name, None), nn.Parameter) for name in _PROJECTIONS)
        and getattr(module, "has_gate", False)
        and not getattr(module, "has_bias", True)
        and not getattr(module, "is_transposed", True)
        and not getattr(module, "has_post_expert_norm", False)
    )


def _experts_of(module: Any, path: str) -> dict[str, FusedWeight]:
    return {
        f"{path}.{expert}.{projection}": FusedWeight(module, path, projection, expert)
        for expert in range(module.down_proj.shape[0])
        for projection in _PROJECTIONS
    }


def _routers_beside(parent: nn.Module, path: str, experts: Any) -> dict[str, FusedWeight]:
    """A module beside the experts whose one parameter is `[experts, hidden]`."""
    num_experts, hidden_size, _ = experts.down_proj.shape
    return {
        f"{path}.{name}": FusedWeight(child, f"{path}.{name}", "weight", None)
        for name, child in parent.named_children()
        if not is_linear(child)
        and [(n, tuple(p.shape)) for n, p in child.named_parameters()]
        == [("weight", (num_experts, hidden_size))]
    }


class FusedLayers:
    """The experts and routers of a base: wraps them once a slot adapts them.

    Args:
        base: The base.
        active: What the wrapped layers see of a forward pass.
    """

    def __init__(self, base: PreTrainedModel, active: ActiveRouting) -> None:
        self._base = base
        self._active = active
        self.weights: dict[str, FusedWeight] = fused_weights(base)
        self._wrapped: dict[str, RoutedExperts | RoutedRouter] = {}

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Name → (in_features, out_features)."""
        sizes: dict[str, tuple[int, int]] = {}
        for name, fused in self.weights.items():
            out_features, in_features = fused.weight.shape
            sizes[name] = FusedSize((int(in_features), int(out_features)))
        return sizes

    def wrap(self, name: str, frozen: FrozenLinear) -> SlotTensors:
        """Returns where the slots' tensors of an expert's projection, or of a router, are kept."""
        fused = self.weights[name]
        wrapped = self._wrapped.get(fused.path)
        if wrapped is None:
            kind = RoutedRouter if fused.expert is None else RoutedExperts
            wrapped = kind(fused.module, self._active, frozen)
            self._base.set_submodule(fused.path, wrapped)
            self._wrapped[fused.path] = wrapped
        if fused.expert is None:
            assert isinstance(wrapped, RoutedRouter)
            return wrapped
        assert isinstance(wrapped, RoutedExperts)
        return wrapped.site(fused.expert, fused.projection, frozen)

    def unwrap(self) -> None:
        """Puts the modules themselves back."""
        for path, wrapped in self._wrapped.items():
            self._base.set_submodule(path, wrapped.base)
        self._wrapped.clear()


def _segments(active: ActiveRouting, num_tokens: int) -> list[tuple[Slot | None, int]]:
    """Slots with their numbers of tokens in a flat `[rows * tokens]`; None is the bare base."""
    tokens = num_tokens // active.num_rows
    segments: list[tuple[Slot | None, int]] = []
    at = 0
    for slot, start, rows in active.slots:
        segments += [(None, (start - at) * tokens), (slot, rows * tokens)]
        at = start + rows
    return [*segments, (None, (active.num_rows - at) * tokens)]


class RoutedRouter(SlotTensors):
    """A router whose weight is each slot's own: with the slot's update for the slot's tokens.

    The update is added to the weight in fp32 at least, for it would drown in a rounded sum.
    """

    def __init__(self, base: nn.Module, active: ActiveRouting, frozen: FrozenLinear) -> None:
        super().__init__(frozen)
        self.base = base
        self._active = active

    def forward(self, x: torch.Tensor, *settings: Any) -> Any:
        """Returns what the router returns: tensors with the tokens first.

        Args:
            x: `[..., in_features]`.
            settings: What some routers get besides, the same for every token.
        """
        slots = {slot.name for slot, _, _ in self._active.slots if self.has(slot.name)}
        if not slots:
            return self.base(x, *settings)
        x_MI = x.reshape(-1, x.shape[-1])
        segments = _segments(self._active, x_MI.shape[0])
        parts = [
            self._routed(piece, settings, slot if slot and slot.name in slots else None)
            for piece, (slot, count) in zip(
                x_MI.split([count for _, count in segments]), segments, strict=True
            )
            if count
        ]
        if isinstance(parts[0], torch.Tensor):
            return torch.cat(parts)
        return tuple(torch.cat(of_kind) for of_kind in zip(*parts, strict=True))

    def _routed(self, x_MI: torch.Tensor, settings: tuple[Any, ...], slot: Slot | None) -> Any:
        if slot is None:
            return self.base(x_MI, *settings)
        assert isinstance(slot.method, LayerMethod)
        weight_EI = self.base.get_parameter("weight")
        wide = torch.promote_types(weight_EI.dtype, torch.float32)
        tensors: dict[str, torch.Tensor] = dict(self.tensors(slot.name))
        update_EI = slot.method.merge_delta(tensors, weight_EI.to(wide))
        # A copy with a weight of its own: lanes run this module at once, and what is swapped in it
        # for one would be met by all.
        router = copy.copy(self.base)
        own = weight_EI.to(wide) + update_EI.to(wide)
        router._parameters = {**self.base._parameters, "weight": own}  # type: ignore[dict-item]
        return router(x_MI.to(wide), *settings)


class _ExpertSite(SlotTensors):
    """The slots' tensors of one projection of one expert."""

    def forward(self, slot: Slot, x_PI: torch.Tensor, base_PO: torch.Tensor) -> torch.Tensor:
        """Returns the output for tokens of one slot, `[pairs, out_features]`."""
        method = slot.method
        assert isinstance(method, LayerMethod)
        stacked = self.stacked(type(method), (slot.name,), (method,), x_PI.dtype)
        routing = GroupRouting(slots=(slot.name,), methods=(method,), num_rows=(1,))
        delta = type(method).delta(x_PI[None], base_PO[None], stacked, routing)
        return base_PO if delta is None else base_PO + delta[0].to(base_PO.dtype)


class RoutedExperts(nn.Module):
    """Fused experts that many adapters share, called as transformers calls them."""

    def __init__(self, base: nn.Module, active: ActiveRouting, _: FrozenLinear) -> None:
        super().__init__()
        self.base: Any = base  # transformers' class, of which only attributes are known
        self.sites = nn.ModuleDict()
        self._active = active

    def site(self, expert: int, projection: str, frozen: FrozenLinear) -> SlotTensors:
        """Returns where one projection of one expert keeps its slots' tensors."""
        key = f"{expert}_{projection}"
        if key not in self.sites:
            self.sites[key] = _ExpertSite(frozen)
        found = self.sites[key]
        assert isinstance(found, _ExpertSite)
        return found

    def forward(
        self, x_MI: torch.Tensor, index_MK: torch.Tensor, weight_MK: torch.Tensor
    ) -> torch.Tensor:
        """Returns the weighted sum over each token's experts, `[tokens, hidden]`."""
        if not any(self._adapts(slot) for slot, _, _ in self._active.slots):
            out: torch.Tensor = self.base(x_MI, index_MK, weight_MK)
            return out
        segments = _segments(self._active, x_MI.shape[0])
        counts = torch.tensor([count for _, count in segments], device=x_MI.device)
        segment_M = torch.repeat_interleave(torch.arange(len(segments)).to(counts), counts)
        expert_P, order_P = index_MK.reshape(-1).sort(stable=True)
        token_P = order_P // index_MK.shape[1]
        # Within an expert tokens stay in order, so the tokens of a segment stay together.
        group_P = expert_P * len(segments) + segment_M[token_P]
        num_experts = self.base.down_proj.shape[0]
        sizes = group_P.bincount(minlength=num_experts * len(segments))
        sizes_ES = sizes.view(num_experts, -1).tolist()
        slots = [slot for slot, _ in segments]
        parts = [
            self._expert(expert, x_PI, slots, sizes_S)
            for expert, (x_PI, sizes_S) in enumerate(
                zip(x_MI[token_P].split([sum(s) for s in sizes_ES]), sizes_ES, strict=True)
            )
            if x_PI.shape[0] or torch.is_grad_enabled()
        ]
        out_PO = torch.cat(parts) * weight_MK.reshape(-1, 1)[order_P]
        by_token_MKO: torch.Tensor = out_PO[order_P.argsort()].unflatten(0, index_MK.shape)
        return by_token_MKO.sum(1).to(x_MI.dtype)

    def _adapts(self, slot: Slot) -> bool:
        sites = [site for site in self.sites.values() if isinstance(site, _ExpertSite)]
        return any(site.has(slot.name) for site in sites)

    def _expert(
        self, expert: int, x_PI: torch.Tensor, slots: list[Slot | None], sizes_S: list[int]
    ) -> torch.Tensor:
        up_PO = self._projected("gate_up_proj", expert, x_PI, slots, sizes_S)
        gated_PI: torch.Tensor = self.base._apply_gate(up_PO)
        return self._projected("down_proj", expert, gated_PI, slots, sizes_S)

    def _projected(
        self,
        projection: str,
        expert: int,
        x_PI: torch.Tensor,
        slots: list[Slot | None],
        sizes_S: list[int],
    ) -> torch.Tensor:
        """One product for the tokens of all slots; an expert without tokens gets gradients of 0."""
        out_PO = nn.functional.linear(x_PI, getattr(self.base, projection)[expert])
        key = f"{expert}_{projection}"
        if key not in self.sites:
            return out_PO
        site = self.sites[key]
        assert isinstance(site, _ExpertSite)
        return torch.cat(
            [
                out if slot is None or not site.has(slot.name) else site(slot, x, out)
                for slot, x, out in zip(
                    slots, x_PI.split(sizes_S), out_PO.split(sizes_S), strict=True
                )
            ]
        )
