"""IA³, the smallest method: it learns one factor a feature and no matrix at all.

Keys and values are scaled at the output of their layers, feed-forward activations at the input of
the layer that ends the block. To be tried where files must be tiny or rows are few; it wants
learning rates far above LoRA's.

Shapes: S slots, N rows, T tokens, I in_features, O out_features.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import model_validator

from graft.core.errors import AdapterError, ConfigError
from graft.core.model import Listed
from graft.core.spaces import Choice, Float, Space
from graft.methods._roles import (
    FEEDFORWARD,
    FEEDFORWARD_OUTPUTS,
    FUSED_ATTENTION_INPUTS,
    KEYS_AND_VALUES,
    endings_found,
    ends_with,
    module_paths,
)
from graft.methods.base import METHODS, Method, Site
from graft.methods.layerwise import FrozenLayer, LayerMethod
from graft.methods.targets import ALL_LINEAR, select_sites

if TYPE_CHECKING:
    import torch

    from graft.methods.base import AdapterTensors
    from graft.methods.routing import GroupRouting


@METHODS.register
class Ia3Method(LayerMethod):
    """Infused adapter by inhibiting and amplifying inner activations.

    Reference:
        Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning,
        arXiv 2205.05638.
    """

    type: Literal["ia3"] = "ia3"
    target_modules: Literal["auto", "all-linear"] | Listed[str] = "auto"
    """Layers to scale: `auto` (keys, values and the output of the feed-forward block, found by
    their usual names), `all-linear`, or endings of module paths."""
    feedforward_modules: Literal["auto"] | Listed[str] = "auto"
    """Those of them that are scaled at the input: `auto` (layers of a feed-forward block, by their
    usual names), or endings of module paths."""

    default_lr: ClassVar[float] = 5e-3
    packable: ClassVar[bool] = True
    mergeable: ClassVar[bool] = True
    servable: ClassVar[frozenset[str]] = frozenset({"native"})
    quantized_base: ClassVar[frozenset[str]] = frozenset({"int8", "nf4"})
    zero_stages: ClassVar[frozenset[int]] = frozenset({0, 1, 2, 3})
    scales_input: ClassVar[bool] = True

    @model_validator(mode="after")
    def feedforward_is_a_part_of_the_targets(self) -> Ia3Method:
        """Refuses an input to scale of a layer that is no target, as PEFT does."""
        if isinstance(self.target_modules, tuple) and isinstance(self.feedforward_modules, tuple):
            odd = sorted(set(self.feedforward_modules) - set(self.target_modules))
            if odd:
                raise ValueError(
                    f"feedforward_modules names {', '.join(odd)}, which target_modules does not; "
                    "add it there too"
                )
        return self

    @classmethod
    def search_space(cls) -> dict[str, Space]:
        """In PEFT's comparison the rate and the layers moved accuracy from 31 % to 45 %."""
        return {
            "method.target_modules": Choice(values=("auto", ALL_LINEAR)),
            "train.lr": Float(low=5e-4, high=2e-2, log=True),
        }

    def sites(self, linears: dict[str, tuple[int, int]]) -> tuple[Site, ...]:
        """Picks the target layers.

        Raises:
            ConfigError: A name matches nothing, or `auto` finds no name that it knows.
        """
        sites = select_sites(linears, self._targets(module_paths(linears)))
        if isinstance(self.feedforward_modules, tuple):
            select_sites(
                {site.name: (site.in_features, site.out_features) for site in sites},
                self.feedforward_modules,
                field="feedforward_modules",
            )
        return sites

    def _targets(self, paths: Collection[str]) -> str | tuple[str, ...]:
        if self.target_modules != "auto":
            return self.target_modules
        attention = endings_found(paths, KEYS_AND_VALUES)
        attention = attention or endings_found(paths, FUSED_ATTENTION_INPUTS)
        found = attention + endings_found(paths, FEEDFORWARD_OUTPUTS)
        if not found:
            leaves = sorted({path.rpartition(".")[2] for path in paths})
            raise ConfigError(
                "method.target_modules: auto knows none of this model's layers; name those of "
                f"keys, values and the feed-forward output among: {', '.join(leaves)}"
            )
        return found

    def scales_input_of(self, site: str) -> bool:
        """Tells whether a layer is scaled at its input."""
        endings = FEEDFORWARD if self.feedforward_modules == "auto" else self.feedforward_modules
        return any(ends_with(site, ending) for ending in endings)

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        """One factor a feature: `[1, in_features]` at the input, else `[out_features, 1]`."""
        at_input = self.scales_input_of(site.name)
        return {"ia3_l": (1, site.in_features) if at_input else (site.out_features, 1)}

    def init(
        self, site: Site, generator: torch.Generator, layer: FrozenLayer
    ) -> dict[str, torch.Tensor]:
        """Ones: nothing is changed at the start."""
        import torch

        return {"ia3_l": torch.ones(self.shapes(site)["ia3_l"])}

    @classmethod
    def stack(
        cls,
        slots: list[dict[str, torch.Tensor]],
        methods: tuple[Method, ...],
        dtype: torch.dtype,
        layer: FrozenLayer,
    ) -> dict[str, torch.Tensor]:
        """What each factor adds to 1, so that half precision keeps small changes."""
        import torch

        changes = [tensors["ia3_l"] - 1.0 for tensors in slots]
        stacked = {}
        for key, axis in (("in_SI", 0), ("out_SO", 1)):
            own = [c for c in changes if c.shape[axis] == 1]
            if own:
                none = torch.zeros_like(own[0])
                rows = [c if c.shape[axis] == 1 else none for c in changes]
                stacked[key] = torch.stack([row.flatten() for row in rows]).to(dtype)
        return stacked

    @classmethod
    def scale_input(
        cls, x_NTI: torch.Tensor, stacked: dict[str, torch.Tensor], routing: GroupRouting
    ) -> torch.Tensor:
        """Scales the input of feed-forward layers."""
        if "in_SI" not in stacked:
            return x_NTI
        return x_NTI.addcmul(x_NTI, _of_rows(stacked["in_SI"], routing))

    @classmethod
    def delta(
        cls,
        x_NTI: torch.Tensor,
        base_NTO: torch.Tensor,
        stacked: dict[str, torch.Tensor],
        routing: GroupRouting,
    ) -> torch.Tensor | None:
        """What scaling adds to the output of the other layers."""
        if "out_SO" not in stacked:
            return None
        return base_NTO * _of_rows(stacked["out_SO"], routing)

    def merge_delta(self, tensors: dict[str, torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
        """Scales columns of the weight at the input, rows at the output."""
        return weight * (tensors["ia3_l"].to(weight) - 1.0)

    def merge_bias_delta(
        self, tensors: dict[str, torch.Tensor], bias: torch.Tensor
    ) -> torch.Tensor | None:
        """The bias is a part of the output."""
        change = tensors["ia3_l"].to(bias) - 1.0
        return bias * change.flatten() if change.shape[1] == 1 else None

    def to_peft(
        self, tensors: AdapterTensors, base: str
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """PEFT's `IA3Config` and its tensor names."""
        from peft import IA3Config

        from graft.methods._state import joined_state

        targets, feedforward = self._peft_targets(list(tensors))
        config = IA3Config(
            task_type="CAUSAL_LM",
            base_model_name_or_path=base,
            inference_mode=True,
            target_modules=targets,
            feedforward_modules=feedforward,
        ).to_dict()
        lists = {"target_modules": targets, "feedforward_modules": feedforward}
        return {**config, **lists}, joined_state(tensors)

    def _peft_targets(self, sites: list[str]) -> tuple[list[str], list[str]]:
        """PEFT wants both lists explicit, the second one a part of the first."""
        endings = self._targets(sites)
        if isinstance(endings, str):
            endings = tuple(sorted({site.rpartition(".")[2] for site in sites}))
        targets, feedforward = [], []
        for ending in endings:
            matched = [site for site in sites if ends_with(site, ending)]
            at_input = [site for site in matched if self.scales_input_of(site)]
            is_mixed = 0 < len(at_input) < len(matched)
            targets += matched if is_mixed else [ending]
            feedforward += at_input if is_mixed else [ending] * bool(at_input)
        return sorted(targets), sorted(feedforward)

    @classmethod
    def from_peft(
        cls, config: dict[str, Any], state: dict[str, torch.Tensor]
    ) -> tuple[Method, AdapterTensors]:
        """Reads PEFT's IA³; a pattern of targets becomes the layers that have tensors.

        Raises:
            AdapterError: Unknown tensor names, or shapes that contradict `feedforward_modules`.
        """
        from graft.methods._state import split_state

        tensors = split_state(state, ("ia3_l",), "IA³")
        at_input = [site for site, of in tensors.items() if of["ia3_l"].shape[:1] == (1,)]
        lists = {"target_modules": list(tensors), "feedforward_modules": at_input}
        if all(isinstance(config.get(key), list) for key in lists):
            lists = {key: config[key] for key in lists}
        method = cls.model_validate(lists)
        for site, of_site in tensors.items():
            shape = tuple(of_site["ia3_l"].shape)
            axis = 0 if method.scales_input_of(site) else 1
            if len(shape) != 2 or shape[axis] != 1:
                raise AdapterError(
                    f"adapter_model.safetensors: {site}.ia3_l is {shape}, but feedforward_modules "
                    f"of adapter_config.json says that its {('input', 'output')[axis]} is scaled"
                )
        return method, tensors


def _of_rows(values_SF: torch.Tensor, routing: GroupRouting) -> torch.Tensor:
    """Each row's values, `[rows or 1, 1, features]`."""
    if len(routing.slots) == 1:
        return values_SF[:, None]
    return values_SF[routing.slot_of_row(values_SF.device)][:, None]
