"""DoRA: LoRA for the direction of each output's weights, and a trained length beside it.

`W' = m * (W + s B A) / |W + s B A|`, lengths taken over each row of the weight and held constant in
the backward pass. Nearer to full fine-tuning than LoRA at low ranks, and slower: every forward pass
in training asks the base's weight for those lengths. QDoRA is this on a quantized base.

Shapes: S slots, N rows, T tokens, I in_features, O out_features, R rank (the largest of the slots).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from graft.core.spaces import Float, Space
from graft.methods._lora_family import LoraFamily
from graft.methods.base import METHODS, Method, Site
from graft.methods.layerwise import FrozenLayer

if TYPE_CHECKING:
    import torch

    from graft.methods.routing import GroupRouting

MAGNITUDE = "lora_magnitude_vector"


@METHODS.register
class DoraMethod(LoraFamily):
    """Weight-decomposed low-rank adaptation.

    Reference:
        DoRA: Weight-Decomposed Low-Rank Adaptation, arXiv 2402.09353, with the detached norm of
        its section 4.3.
    """

    type: Literal["dora"] = "dora"

    servable: ClassVar[frozenset[str]] = frozenset({"native"})
    zero_stages: ClassVar[frozenset[int]] = frozenset({0, 1, 2, 3})
    peft_only_fields: ClassVar[frozenset[str]] = frozenset({"use_dora", "eva_config"})
    peft_names: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B", MAGNITUDE)

    @classmethod
    def search_space(cls) -> dict[str, Space]:
        """LoRA's ranks; its best learning rates are somewhat below LoRA's."""
        return {**super().search_space(), "train.lr": Float(low=2e-5, high=2e-3, log=True)}

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        """LoRA's, and one length for each output."""
        return {**super().shapes(site), MAGNITUDE: (site.out_features,)}

    def init(
        self, site: Site, generator: torch.Generator, layer: FrozenLayer
    ) -> dict[str, torch.Tensor]:
        """LoRA's pair, and the lengths that the weight has with it."""
        tensors = super().init(site, generator, layer)
        weight_OI = layer.weight()
        placed = {key: value.to(weight_OI) for key, value in tensors.items()}
        norm_SO = _norms(*self.padded([placed], (self,)), layer)
        return {**tensors, MAGNITUDE: norm_SO[0]}

    @classmethod
    def stack(
        cls,
        slots: list[dict[str, torch.Tensor]],
        methods: tuple[Method, ...],
        dtype: torch.dtype,
        layer: FrozenLayer,
    ) -> dict[str, torch.Tensor]:
        """LoRA's, with the gain `m / |W + s B A|` folded into B, and the gain less 1 for `W x`."""
        import torch

        from graft.methods._low_rank import stacked_factors

        a_SRI, b_SRO = cls.padded(slots, methods)
        magnitude_SO = torch.stack([tensors[MAGNITUDE] for tensors in slots])
        gain_SO = magnitude_SO / _norms(a_SRI, b_SRO, layer)
        stacked = {
            **stacked_factors(a_SRI, b_SRO * gain_SO[:, None], dtype),
            "more_SO": (gain_SO - 1).to(dtype),
        }
        bias_O = layer.bias()
        if bias_O is not None:
            stacked["bias_O"] = bias_O.to(dtype)
        is_dropping = any(m.lora_dropout for m in methods if isinstance(m, DoraMethod))
        if is_dropping and torch.is_grad_enabled():
            stacked["weight_OI"] = layer.weight().to(dtype)
        return stacked

    @classmethod
    def delta(
        cls,
        x_NTI: torch.Tensor,
        base_NTO: torch.Tensor,
        stacked: dict[str, torch.Tensor],
        routing: GroupRouting,
    ) -> torch.Tensor:
        """`(g - 1) W x + g s B A x` with the gain g; in training both see the dropped input."""
        from graft.methods._low_rank import low_rank_product

        dropped_NTI = cls.dropped(x_NTI, routing)
        product_NTO = low_rank_product(dropped_NTI, stacked["a_SIR"], stacked["b_SRO"], routing)
        if dropped_NTI is not x_NTI:
            frozen_NTO = _frozen_of_dropped(dropped_NTI, base_NTO, stacked, routing)
        else:
            bias_O = stacked.get("bias_O")
            frozen_NTO = base_NTO if bias_O is None else base_NTO - bias_O
        if len(routing.slots) == 1:
            more_NO = stacked["more_SO"]
        else:
            more_NO = stacked["more_SO"][routing.slot_of_row(x_NTI.device)]
        return product_NTO + more_NO[:, None] * frozen_NTO

    def merge_delta(self, tensors: dict[str, torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
        """`m (W + s B A) / |W + s B A| - W`."""
        turned_OI = weight + self.update(tensors).to(weight)
        norm_O = turned_OI.norm(dim=1).clamp_min(_tiny(turned_OI))
        gain_O = tensors[MAGNITUDE].to(weight) / norm_O
        merged_OI: torch.Tensor = gain_O[:, None] * turned_OI
        return merged_OI - weight

    @classmethod
    def reads_peft(cls, config: dict[str, Any]) -> bool:
        """PEFT's LORA with a magnitude vector."""
        return config.get("peft_type") == "LORA" and bool(config.get("use_dora"))


def _norms(a_SRI: torch.Tensor, b_SRO: torch.Tensor, layer: FrozenLayer) -> torch.Tensor:
    """Length of each row of `W + s B A`, `[slots, out_features]`, without forming the sum.

    The square of a sum: `|w|^2 + 2 w.(s b A) + |s b A|^2`, where all slots share one product with W
    and the last term needs no more than `A A^T`.
    """
    import torch

    with torch.no_grad():
        weight_OI = layer.weight()
        a_SRI, b_SRO = a_SRI.to(weight_OI.dtype), b_SRO.to(weight_OI.dtype)
        seen_SRO = (a_SRI.flatten(0, 1) @ weight_OI.T).view_as(b_SRO)
        inner_SRO = 2 * seen_SRO + a_SRI @ a_SRI.transpose(1, 2) @ b_SRO
        squared_SO = layer.squared_row_norms() + (inner_SRO * b_SRO).sum(1)
        return squared_SO.clamp_min(_tiny(weight_OI)).sqrt()


def _tiny(tensor: torch.Tensor) -> float:
    """Rows that are all zero have a length that one can divide by."""
    import torch

    return float(torch.finfo(tensor.dtype).tiny)


def _frozen_of_dropped(
    dropped_NTI: torch.Tensor,
    base_NTO: torch.Tensor,
    stacked: dict[str, torch.Tensor],
    routing: GroupRouting,
) -> torch.Tensor:
    """`W x` of the dropped input, anew; without its bias; as it is for slots that drop nothing."""
    import torch

    counts = list(routing.num_rows)
    bias_O = stacked.get("bias_O")
    parts = []
    for method, x, base in zip(
        routing.methods, dropped_NTI.split(counts), base_NTO.split(counts), strict=True
    ):
        if isinstance(method, DoraMethod) and method.lora_dropout:
            parts.append(x @ stacked["weight_OI"].T)
        else:
            parts.append(base if bias_O is None else base - bias_O)
    return torch.cat(parts)
