"""What LoRA and DoRA share: a pair of thin matrices at each layer, its settings and its files.

Shapes: S slots, N rows, T tokens, I in_features, O out_features, R rank (the largest of the slots).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from graft.core.errors import ConfigError
from graft.core.model import Listed
from graft.core.spaces import Choice, Float, Space
from graft.methods._initial import TAKEN_FROM_BASE, InitialWeights, initial_pair
from graft.methods.base import Method, Site, Surroundings
from graft.methods.layerwise import FrozenLayer, LayerMethod
from graft.methods.targets import select_sites

if TYPE_CHECKING:
    from typing import Self

    import torch

    from graft.methods.base import AdapterTensors
    from graft.methods.routing import GroupRouting


_FAST = ("lora_B", "lora_magnitude_vector")


class LoraFamily(LayerMethod):
    """Base of the methods whose update is a product of rank r, `scale * B A`.

    Where a first pair is kept, the adapter is saved as the equal one of rank 2r without it: PEFT,
    servers and compressors see a plain adapter, and `train.init_from` takes it apart again.
    """

    r: int = Field(16, ge=1)
    """Rank of the update."""
    lora_alpha: float = Field(32.0, gt=0)
    """The update is scaled by lora_alpha / r."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Probability of dropping an input feature of the update while training."""
    target_modules: Literal["all-linear"] | Listed[str] = "all-linear"
    """Layers to adapt: `all-linear`, or endings of module paths."""
    layers_to_transform: Listed[Annotated[int, Field(ge=0)]] | None = Field(None, min_length=1)
    """Only in these decoder layers, by number from 0; None is all. Where no trial of a pack adapts
    the lower ones, those are computed once a row and not once a step."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead."""
    loraplus_lr_ratio: float = Field(1.0, ge=1)
    """B learns that many times as fast as A (LoRA+); 16 is the paper's."""
    init_lora_weights: InitialWeights = "default"
    """First weights. `pissa` and `olora` start from the base's weight, `eva` looks at training
    rows, `loftq` makes up for what a quantized base lost."""

    packable: ClassVar[bool] = True
    mergeable: ClassVar[bool] = True
    quantized_base: ClassVar[frozenset[str]] = frozenset({"int8", "nf4"})
    frozen: ClassVar[frozenset[str]] = frozenset({"lora_A0", "lora_B0"})
    peft_names: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")
    """Tensors of a site in PEFT's files."""

    @model_validator(mode="after")
    def orthogonal_has_two_halves(self) -> Self:
        """Refuses an odd rank where the ranks are split in two."""
        if self.init_lora_weights == "orthogonal" and self.r % 2:
            raise ValueError(
                f"init_lora_weights: orthogonal needs an even r, not {self.r}; use {self.r + 1}"
            )
        return self

    @property
    def scale(self) -> float:
        """The factor before `B A`."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @property
    def looks_at_inputs(self) -> bool:
        """EVA starts from the directions in which a layer's inputs vary."""
        return self.init_lora_weights == "eva"

    @property
    def keeps_first_pair(self) -> bool:
        """Its tensors hold the pair that it started from too, which its product is less."""
        return self.init_lora_weights in TAKEN_FROM_BASE

    @classmethod
    def search_space(cls) -> dict[str, Space]:
        """Rank and learning rate move results most (arXiv 2602.04998)."""
        return {
            "method.r": Choice(values=(8, 16, 32, 64)),
            "train.lr": Float(low=5e-5, high=5e-3, log=True),
        }

    def refusals(self, around: Surroundings) -> list[str]:
        """Adds what some first weights need of the base."""
        found = super().refusals(around)
        kind = self.init_lora_weights
        if around.quantization != "none" and self.keeps_first_pair:
            found.append(
                f"method.init_lora_weights {kind} splits a weight that model.quantization "
                f"{around.quantization} has rounded already; use loftq, which starts from what the "
                "rounding lost, or model.quantization none"
            )
        if around.quantization == "none" and kind == "loftq":
            found.append(
                "method.init_lora_weights loftq makes up for quantization and the base has none; "
                "use pissa, or set model.quantization to nf4 or int8"
            )
        return found

    def lr_scale(self, tensor: str) -> float:
        """LoRA+: B, and a magnitude, learn `loraplus_lr_ratio` times as fast, as PEFT has them."""
        return self.loraplus_lr_ratio if tensor in _FAST else 1.0

    def sites(self, linears: dict[str, tuple[int, int]]) -> tuple[Site, ...]:
        """Picks the target layers.

        Raises:
            ConfigError: A target matches nothing, or `r`, as saved, exceeds a layer's smaller side.
        """
        sites = select_sites(linears, self.target_modules, layers=self.layers_to_transform)
        for site in sites:
            side = min(site.in_features, site.out_features)
            largest = side // 2 if self.keeps_first_pair else side
            if self.r > largest:
                why = f", {self.init_lora_weights} is saved at rank 2 r" if largest < side else ""
                raise ConfigError(
                    f"method.r: {self.r} is above the size of {site.name} "
                    f"({site.out_features} x {site.in_features}{why}); use at most {largest}"
                )
        return sites

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        """A `[r, in_features]` and B `[out_features, r]`, and the first pair where it is kept."""
        pair = {"lora_A": (self.r, site.in_features), "lora_B": (site.out_features, self.r)}
        first = {f"{name}0": shape for name, shape in pair.items()} if self.keeps_first_pair else {}
        return {**pair, **first}

    def init(
        self, site: Site, generator: torch.Generator, layer: FrozenLayer
    ) -> dict[str, torch.Tensor]:
        """The pair that `init_lora_weights` names."""
        return initial_pair(
            self.init_lora_weights,
            self.r,
            self.scale,
            site=site,
            generator=generator,
            layer=layer,
        )

    @classmethod
    def padded(
        cls, slots: list[dict[str, torch.Tensor]], methods: tuple[Method, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns A `[slots, R, I]` and scaled B `[slots, R, O]`, filled up with zeros."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        pairs = [pair_of(tensors) for tensors in slots]
        a_SRI = pad_sequence([a_RI for a_RI, _ in pairs], batch_first=True)
        b_SRO = pad_sequence([b_OR.T for _, b_OR in pairs], batch_first=True)
        scale_S = torch.tensor([m.scale for m in methods if isinstance(m, LoraFamily)])
        return a_SRI, b_SRO * scale_S.to(b_SRO)[:, None, None]

    @classmethod
    def dropped(cls, x_NTI: torch.Tensor, routing: GroupRouting) -> torch.Tensor:
        """Returns the input with features dropped at each slot's rate; itself when evaluating."""
        from graft.methods._low_rank import drop_input

        rates = [m.lora_dropout for m in routing.methods if isinstance(m, LoraFamily)]
        return drop_input(x_NTI, rates, routing)

    def update(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """Returns `scale * B A` of one site, less a kept first pair; at least fp32."""
        import torch

        a_RI, b_OR = pair_of(
            {k: v.to(torch.promote_types(v.dtype, torch.float32)) for k, v in tensors.items()}
        )
        return self.scale * (b_OR @ a_RI)

    def plain(self, tensors: AdapterTensors) -> tuple[Self, AdapterTensors]:
        """Returns the same adapter without a kept first pair: of rank 2r where there is one."""
        if not self.keeps_first_pair:
            return self, tensors
        r = 2 * self.r
        alpha = self.scale * (math.sqrt(r) if self.use_rslora else r)
        settings = {"r": r, "lora_alpha": alpha, "init_lora_weights": "default"}
        method = type(self).model_validate({**self.model_dump(), **settings})
        found: AdapterTensors = {}
        for site, of_site in tensors.items():
            a_RI, b_OR = pair_of(of_site)
            kept = {key: value for key, value in of_site.items() if key not in self.frozen}
            found[site] = {**kept, "lora_A": a_RI, "lora_B": b_OR}
        return method, found

    def starting_tensors(self, given: Method, tensors: AdapterTensors) -> AdapterTensors:
        """Takes a plain adapter of rank 2r apart where a first pair is kept: `plain` backwards.

        Weights of another scale (`lora_alpha`, `use_rslora`) are brought to this one: what they
        compute stays the same.
        """
        if isinstance(given, LoraFamily) and given.scale != self.scale:
            factor = given.scale / self.scale
            tensors = {
                site: {
                    key: value * factor if key in ("lora_B", "lora_B0") else value
                    for key, value in of_site.items()
                }
                for site, of_site in tensors.items()
            }
        is_double = isinstance(given, LoraFamily) and given.r == 2 * self.r
        if not (self.keeps_first_pair and is_double):
            return tensors
        r, found = self.r, {}
        for site, of_site in tensors.items():
            a_RI, b_OR = of_site["lora_A"], of_site["lora_B"]
            b0_OR = b_OR[:, r:]
            found[site] = {
                **of_site,
                "lora_A": a_RI[:r],
                "lora_B": b_OR[:, :r] + b0_OR,
                "lora_A0": a_RI[:r] - a_RI[r:],
                "lora_B0": b0_OR,
            }
        return found

    def to_peft(
        self, tensors: AdapterTensors, base: str
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """PEFT's `LoraConfig` and its tensor names, in `plain` form."""
        from graft.methods._lora_files import lora_files

        method, tensors = self.plain(tensors)
        return lora_files(
            method, tensors, base, use_dora="lora_magnitude_vector" in self.peft_names
        )

    @classmethod
    def from_peft(
        cls, config: dict[str, Any], state: dict[str, torch.Tensor]
    ) -> tuple[Method, AdapterTensors]:
        """Reads an adapter of one rank; variants that change the mathematics are refused.

        Raises:
            AdapterError: A feature outside the method, unknown tensor names, or shapes unlike `r`.
        """
        from graft.methods._lora_files import read_lora_files

        return read_lora_files(cls, config, state)


def pair_of(tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns A and B; less the first pair, where it is kept, they have twice the rank.

    `B A - B0 A0` is written as `(B - B0) A + B0 (A - A0)`: exactly nothing at the start, and small
    differences are formed before anything is rounded to the base's dtype.
    """
    import torch

    a_RI, b_OR = tensors["lora_A"], tensors["lora_B"]
    if "lora_A0" not in tensors:
        return a_RI, b_OR
    a0_RI, b0_OR = tensors["lora_A0"], tensors["lora_B0"]
    return torch.cat([a_RI, a_RI - a0_RI]), torch.cat([b_OR - b0_OR, b0_OR], dim=1)
