"""Slots of the methods that adapt linear layers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from graft.core.errors import AdapterError, ConfigError
from graft.core.seeds import derive_seed
from graft.engine.multi.experts import FusedLayers
from graft.engine.multi.frozen import FrozenLinear, is_linear
from graft.engine.multi.layer import ActiveRouting, RoutedLinear, SlotTensors
from graft.methods.base import Site
from graft.methods.layerwise import LayerMethod


class LayerSlots:
    """Wraps linear layers of the base in place, once each, and hands slots their tensors.

    Args:
        base: The base.
        head: Its output head, which is never adapted.
        active: What the wrapped layers see of a forward pass.
    """

    def __init__(self, base: PreTrainedModel, head: nn.Module, active: ActiveRouting) -> None:
        self._base = base
        self._active = active
        self._linears = {
            name: module
            for name, module in base.named_modules()
            if is_linear(module) and module is not head
        }
        self._fused = FusedLayers(base, active)
        self._layers: dict[str, SlotTensors] = {}
        self._sites: dict[str, tuple[Site, ...]] = {}

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Every linear layer below the head: module path → (in_features, out_features).

        Experts and routers of a mixture-of-experts base follow, each under a name of its own.
        """
        own = {
            name: (int(module.in_features), int(module.out_features))
            for name, module in self._linears.items()
        }
        return own | self._fused.sizes

    @property
    def adapts_experts(self) -> bool:
        """An expert or router has been adapted."""
        return bool(self._fused.weights.keys() & self._layers.keys())

    @property
    def adapted(self) -> frozenset[str]:
        """Paths of the layers that slots adapt."""
        return frozenset(site.name for sites in self._sites.values() for site in sites)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The same layers themselves, unwrapped."""
        return dict(self._linears)

    def fresh(
        self,
        method: LayerMethod,
        seed: int,
        moments: Mapping[str, torch.Tensor] | None = None,
    ) -> dict[str, dict[str, torch.Tensor]]:
        """Draws initial tensors; each site has its own stream.

        Args:
            method: Whose.
            seed: Of the streams.
            moments: Of the layers' inputs, where the method looks at them.
        """
        tensors = {}
        for site in self._sites_of(method):
            generator = torch.Generator().manual_seed(derive_seed("init", seed, site.name))
            frozen = self._frozen(site.name, (moments or {}).get(site.name))
            tensors[site.name] = method.init(site, generator, frozen)
        return tensors

    def require_fit(
        self, name: str, method: LayerMethod, tensors: Mapping[str, Mapping[str, torch.Tensor]]
    ) -> None:
        """Refuses tensors of other layers or shapes.

        Raises:
            AdapterError: They do not fit.
        """
        sites = self._sites_of(method)
        wanted = {site.name for site in sites}
        if wanted != set(tensors):
            odd = sorted(wanted ^ set(tensors))
            raise AdapterError(
                f"adapter {name!r} does not fit the base: it has weights for "
                f"{len(tensors)} layers, "
                f"its settings name {len(wanted)}; first difference: {odd[0]}"
            )
        for site in sites:
            for key, shape in method.shapes(site).items():
                given = tensors[site.name].get(key)
                if given is None or tuple(given.shape) != shape:
                    raise AdapterError(
                        f"adapter {name!r} does not fit the base: {site.name}.{key} should be "
                        f"{shape}, is {None if given is None else tuple(given.shape)}"
                    )

    def add(
        self,
        name: str,
        method: LayerMethod,
        tensors: Mapping[str, dict[str, torch.Tensor]],
        *,
        trainable: bool,
    ) -> None:
        """Puts a slot's tensors, already of the right dtype and device, on its layers."""
        self._sites[name] = self._sites_of(method)
        frozen = method.frozen if trainable else None
        for site in self._sites[name]:
            self._layer(site.name).add(name, tensors[site.name], frozen=frozen)

    def remove(self, name: str) -> None:
        """Takes a slot off."""
        for site in self._sites.pop(name):
            self._layers[site.name].remove(name)

    def unwrap(self) -> None:
        """Puts the layers themselves back where no slot is left: another kind needs them bare."""
        for name, layer in self._layers.items():
            if isinstance(layer, RoutedLinear):
                self._base.set_submodule(name, layer.base)
        self._fused.unwrap()
        self._layers.clear()

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """One slot's parameters, `site.tensor` → parameter."""
        return {
            f"{site.name}.{key}": parameter
            for site in self._sites[name]
            for key, parameter in self._layers[site.name].tensors(name).items()
        }

    def weights_changed(self) -> None:
        """Drops what was computed from weights."""
        for layer in self._layers.values():
            layer.forget_stacks()

    def _sites_of(self, method: LayerMethod) -> tuple[Site, ...]:
        """The method's sites; experts and routers only where it can adapt them.

        Raises:
            ConfigError: A target matches nothing, or an expert that the method cannot adapt.
        """
        sites = method.sites(self.linears)
        reason = method.expert_refusal()
        for site in sites if reason is not None else ():
            if site.name in self._fused.weights:
                raise ConfigError(
                    f"method.target_modules: {site.name} is an expert or router of a fused "
                    f"mixture-of-experts layer; {reason}"
                )
        return sites

    def _layer(self, name: str) -> SlotTensors:
        if name not in self._layers:
            frozen = self._frozen(name)
            if name in self._fused.weights:
                self._layers[name] = self._fused.wrap(name, frozen)
            else:
                index = list(self._linears).index(name)
                layer = RoutedLinear(self._linears[name], index, self._active, frozen)
                self._base.set_submodule(name, layer)
                self._layers[name] = layer
        return self._layers[name]

    def _frozen(self, name: str, moment: torch.Tensor | None = None) -> FrozenLinear:
        folder = Path(self._base.config._name_or_path or "/nonexistent")
        return FrozenLinear(
            self._fused.weights.get(name) or self._linears[name],
            name,
            folder=folder if folder.is_dir() else None,
            moment=moment,
        )
