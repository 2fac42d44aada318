"""Memory tuning: banks of very many very small experts, of which an index picks a few a token.

For facts that must come back word for word while everything else stays as it was: what a token
learns is written into the few experts that its hidden state picks, so other texts hardly meet it.
The index is random and frozen. Train until the facts are exact (`train.stop_at_loss`), and with
`train.eps` near 1e-4: most gradients of a bank are tiny, and Adam would make full steps of them.

All experts are computed and those not picked weigh nothing: at 1,024 experts and 830 tokens one
pass of training takes a fifth of the time that gathering each token's own experts takes (CPU).

Shapes: N rows, T tokens, I in_features, O out_features, M experts, R rank of one expert, K experts
picked.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from graft.core.model import Listed
from graft.core.spaces import Choice, Float, Space
from graft.methods._own_files import OwnFilesMethod
from graft.methods._roles import FEEDFORWARD_OUTPUTS, ends_with, module_paths, usual_endings
from graft.methods.base import METHODS, Method, Site
from graft.methods.layerwise import FrozenLayer
from graft.methods.targets import select_sites

if TYPE_CHECKING:
    import torch

    from graft.methods.routing import GroupRouting

_TENSORS = ("memory_A", "memory_B", "memory_keys")


@METHODS.register
class MemoryMethod(OwnFilesMethod):
    """A bank of small experts at a few layers, behind a frozen random index.

    Reference:
        Banishing LLM Hallucinations Requires Rethinking Generalization, arXiv 2406.17642.
    """

    type: Literal["memory"] = "memory"
    num_experts: int = Field(1024, ge=1)
    """Experts in the bank of each adapted layer."""
    r: int = Field(1, ge=1)
    """Rank of one expert."""
    top_k: int = Field(16, ge=1)
    """Experts that take part for a token."""
    lora_alpha: float = Field(16.0, gt=0)
    """Each expert's update is scaled by lora_alpha / r."""
    target_modules: Literal["auto", "all-linear"] | Listed[str] = "auto"
    """Layers with a bank: endings of module paths, or `auto`: the output layers of a few MLPs."""

    default_lr: ClassVar[float] = 5e-3
    packable: ClassVar[bool] = True
    servable: ClassVar[frozenset[str]] = frozenset({"native"})
    quantized_base: ClassVar[frozenset[str]] = frozenset({"int8", "nf4"})
    zero_stages: ClassVar[frozenset[int]] = frozenset({0, 1, 2, 3})
    frozen: ClassVar[frozenset[str]] = frozenset({"memory_keys"})
    tensor_names: ClassVar[tuple[str, ...]] = _TENSORS

    @model_validator(mode="after")
    def top_k_is_within_the_bank(self) -> MemoryMethod:
        """Refuses to pick more experts than there are."""
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k {self.top_k} is above num_experts {self.num_experts}; "
                f"use at most {self.num_experts}"
            )
        return self

    @classmethod
    def search_space(cls) -> dict[str, Space]:
        """How many experts share a token, and the learning rate."""
        return {
            "method.top_k": Choice(values=(4, 16, 64)),
            "train.lr": Float(low=5e-4, high=2e-2, log=True),
            "train.eps": Float(low=1e-6, high=1e-3, log=True),
        }

    def sites(self, linears: dict[str, tuple[int, int]]) -> tuple[Site, ...]:
        """Picks the target layers.

        Raises:
            ConfigError: A target matches nothing.
        """
        if self.target_modules == "auto":
            return select_sites(linears, _some_mlp_outputs(linears))
        return select_sites(linears, self.target_modules)

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        """A `[num_experts * r, in]`, B `[out, num_experts * r]`, keys `[num_experts, in]`."""
        return {
            "memory_A": (self.num_experts * self.r, site.in_features),
            "memory_B": (site.out_features, self.num_experts * self.r),
            "memory_keys": (self.num_experts, site.in_features),
        }

    def init(
        self, site: Site, generator: torch.Generator, layer: FrozenLayer
    ) -> dict[str, torch.Tensor]:
        """A uniform in ±1/sqrt(in_features), B zero, keys of length 1 in random directions."""
        import torch

        bound = 1.0 / math.sqrt(site.in_features)
        shapes = self.shapes(site)
        keys = torch.randn(shapes["memory_keys"], generator=generator)
        return {
            "memory_A": torch.empty(shapes["memory_A"]).uniform_(
                -bound, bound, generator=generator
            ),
            "memory_B": torch.zeros(shapes["memory_B"]),
            "memory_keys": keys / keys.norm(dim=1, keepdim=True),
        }

    @classmethod
    def stack(
        cls,
        slots: list[dict[str, torch.Tensor]],
        methods: tuple[Method, ...],
        dtype: torch.dtype,
        layer: FrozenLayer,
    ) -> dict[str, torch.Tensor]:
        """Banks stay apart, for each is as large as the layer: `a.0`, `b.0`, `keys.0`, ..."""
        stacked = {}
        for at, (tensors, method) in enumerate(zip(slots, methods, strict=True)):
            assert isinstance(method, MemoryMethod)
            stacked[f"a.{at}"] = tensors["memory_A"].to(dtype)
            scaled = tensors["memory_B"] * (method.lora_alpha / method.r)
            stacked[f"b.{at}"] = scaled.to(dtype)
            stacked[f"keys.{at}"] = tensors["memory_keys"].to(dtype)
        return stacked

    @classmethod
    def delta(
        cls,
        x_NTI: torch.Tensor,
        base_NTO: torch.Tensor,
        stacked: dict[str, torch.Tensor],
        routing: GroupRouting,
    ) -> torch.Tensor:
        """Each slot's own bank over its rows."""
        import torch

        parts = []
        for at, x in enumerate(x_NTI.split(list(routing.num_rows))):
            method = routing.methods[at]
            assert isinstance(method, MemoryMethod)
            weight_NTM = _picked(x, stacked[f"keys.{at}"], method.top_k)
            low = x @ stacked[f"a.{at}"].T
            opened = low * weight_NTM.to(low.dtype).repeat_interleave(method.r, dim=-1)
            parts.append(opened @ stacked[f"b.{at}"].T)
        return torch.cat(parts)


_AUTO_DEPTHS = (0.6, 0.67, 0.73, 0.8)
"""Of the layers with a bank: late enough for inputs that tell tokens apart, and cheap to train."""


def _some_mlp_outputs(linears: dict[str, tuple[int, int]]) -> tuple[str, ...]:
    """The MLP's output layers of a few decoder layers."""
    paths = module_paths(linears)
    endings = usual_endings(paths, FEEDFORWARD_OUTPUTS, field="target_modules")
    names = [path for path in paths if any(ends_with(path, ending) for ending in endings)]
    chosen = {min(round(depth * len(names)), len(names) - 1) for depth in _AUTO_DEPTHS}
    return tuple(names[at] for at in sorted(chosen))


def _picked(x_NTI: torch.Tensor, keys_MI: torch.Tensor, top_k: int) -> torch.Tensor:
    """Returns the weight of every expert for every token, zero for those not picked.

    Scores are cosines times sqrt(in_features): spread by about 1 whatever the layer's scale.
    """
    import torch

    width = x_NTI.shape[-1]
    wide = x_NTI.to(torch.promote_types(x_NTI.dtype, torch.float32))
    length_NT1 = wide.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(wide.dtype).tiny)
    cosines_NTM = (x_NTI @ keys_MI.T).to(wide.dtype) / length_NT1
    scores_NTK, index_NTK = (cosines_NTM * math.sqrt(width)).topk(top_k, dim=-1)
    weight_NTM = torch.zeros_like(cosines_NTM)
    return weight_NTM.scatter(-1, index_NTK, scores_NTK.softmax(dim=-1))
