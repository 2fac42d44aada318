"""Bottleneck adapters: a small network behind a sublayer, `h + W_up act(W_down h)`.

The first adapters of transformers. They act on what attention and feed-forward blocks put out and
cannot be put into the weights; to be tried where LoRA's linear update is not enough.

Shapes: N rows, T tokens, I in_features, O out_features, M bottleneck size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from graft.core.errors import ConfigError
from graft.core.model import Listed
from graft.core.spaces import Choice, Float, Space
from graft.methods._own_files import OwnFilesMethod
from graft.methods._roles import (
    ATTENTION_OUTPUTS,
    FEEDFORWARD_OUTPUTS,
    module_paths,
    usual_endings,
)
from graft.methods.base import METHODS, Method, Site
from graft.methods.layerwise import FrozenLayer
from graft.methods.targets import select_sites

if TYPE_CHECKING:
    import torch

    from graft.methods.routing import GroupRouting

_TENSORS = ("down_weight", "down_bias", "up_weight", "up_bias")


@METHODS.register
class BottleneckMethod(OwnFilesMethod):
    """Adapters behind sublayers, before the residual sum.

    Reference:
        Parameter-Efficient Transfer Learning for NLP, arXiv 1902.00751 (`houlsby`);
        AdapterFusion: Non-Destructive Task Composition for Transfer Learning, arXiv 2005.00247
        (`pfeiffer`).
    """

    type: Literal["bottleneck"] = "bottleneck"
    placement: Literal["houlsby", "pfeiffer"] = "pfeiffer"
    """`houlsby`: behind attention and feed-forward blocks; `pfeiffer`: behind the latter alone."""
    bottleneck_size: int | None = Field(None, ge=1)
    """Width of the small network; None means the layer's width / reduction_factor."""
    reduction_factor: int = Field(16, ge=1)
    """How much narrower than the layer the small network is, where no size is given."""
    activation: Literal["relu", "gelu", "silu"] = "relu"
    """Between the two matrices."""
    attention_modules: Listed[str] | None = None
    """Endings of the paths of attention's last layers; None finds them by their usual names."""
    feedforward_modules: Listed[str] | None = None
    """The same of feed-forward blocks."""

    default_lr: ClassVar[float] = 3e-4
    packable: ClassVar[bool] = True
    servable: ClassVar[frozenset[str]] = frozenset({"native"})
    quantized_base: ClassVar[frozenset[str]] = frozenset({"int8", "nf4"})
    zero_stages: ClassVar[frozenset[int]] = frozenset({0, 1, 2, 3})
    tensor_names: ClassVar[tuple[str, ...]] = _TENSORS

    @model_validator(mode="after")
    def attention_has_an_adapter(self) -> BottleneckMethod:
        """Refuses layers that the placement leaves alone."""
        if self.placement == "pfeiffer" and self.attention_modules is not None:
            raise ValueError(
                "attention_modules is set, but placement pfeiffer has no adapter behind attention; "
                "choose placement houlsby or remove it"
            )
        return self

    @classmethod
    def search_space(cls) -> dict[str, Space]:
        """Placements and sizes of the two papers; rates of the first one's sweep."""
        return {
            "method.placement": Choice(values=("houlsby", "pfeiffer")),
            "method.reduction_factor": Choice(values=(4, 16, 64)),
            "train.lr": Float(low=3e-5, high=3e-3, log=True),
        }

    def sites(self, linears: dict[str, tuple[int, int]]) -> tuple[Site, ...]:
        """Picks the layers whose output is a block's output.

        Raises:
            ConfigError: A name matches nothing, none is known, or the bottleneck is no bottleneck.
        """
        paths = module_paths(linears)
        endings = self._endings(paths, "feedforward_modules", FEEDFORWARD_OUTPUTS)
        chosen = set(select_sites(linears, endings, field="feedforward_modules"))
        if self.placement == "houlsby":
            endings = self._endings(paths, "attention_modules", ATTENTION_OUTPUTS)
            chosen.update(select_sites(linears, endings, field="attention_modules"))
        for site in chosen:
            if self.size(site) > site.out_features:
                raise ConfigError(
                    f"method.bottleneck_size: {self.bottleneck_size} is above the width of "
                    f"{site.name}, {site.out_features}; use at most that"
                )
        in_order = (Site(name, *size) for name, size in linears.items())
        return tuple(site for site in in_order if site in chosen)

    def _endings(self, paths: list[str], field: str, usual: tuple[str, ...]) -> tuple[str, ...]:
        given: tuple[str, ...] | None = getattr(self, field)
        if given is None:
            return usual_endings(paths, usual, field=field)
        if not given:
            raise ConfigError(f"method.{field} names no layer; leave it out for the usual ones")
        return given

    def size(self, site: Site) -> int:
        """Width of the small network at a layer."""
        return self.bottleneck_size or max(1, site.out_features // self.reduction_factor)

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        """Two matrices and their biases: `2 m d + d + m` numbers for size m and width d."""
        size, width = self.size(site), site.out_features
        shapes = ((size, width), (size,), (width, size), (width,))
        return dict(zip(_TENSORS, shapes, strict=True))

    def init(
        self, site: Site, generator: torch.Generator, layer: FrozenLayer
    ) -> dict[str, torch.Tensor]:
        """As in the paper, a normal of 0.01 cut at two deviations, but W_up zero: an identity."""
        import torch

        tensors = {name: torch.zeros(shape) for name, shape in self.shapes(site).items()}
        torch.nn.init.trunc_normal_(
            tensors["down_weight"], std=0.01, a=-0.02, b=0.02, generator=generator
        )
        return tensors

    @classmethod
    def stack(
        cls,
        slots: list[dict[str, torch.Tensor]],
        methods: tuple[Method, ...],
        dtype: torch.dtype,
        layer: FrozenLayer,
    ) -> dict[str, torch.Tensor]:
        """Each slot's own tensors, numbered: their sizes and activations differ."""
        return {
            f"{name}_{number}": tensors[name].to(dtype)
            for number, tensors in enumerate(slots)
            for name in _TENSORS
        }

    @classmethod
    def delta(
        cls,
        x_NTI: torch.Tensor,
        base_NTO: torch.Tensor,
        stacked: dict[str, torch.Tensor],
        routing: GroupRouting,
    ) -> torch.Tensor:
        """The small network of each slot on the layer's output."""
        import torch
        from torch.nn import functional

        parts = []
        of_slots = zip(routing.methods, base_NTO.split(list(routing.num_rows)), strict=True)
        for number, (method, out_NTO) in enumerate(of_slots):
            assert isinstance(method, BottleneckMethod)
            down_MO, down_M, up_OM, up_O = (stacked[f"{name}_{number}"] for name in _TENSORS)
            act = getattr(functional, method.activation)
            hidden_NTM = act(functional.linear(out_NTO, down_MO, down_M))
            parts.append(functional.linear(hidden_NTM, up_OM, up_O))
        return parts[0] if len(parts) == 1 else torch.cat(parts)
