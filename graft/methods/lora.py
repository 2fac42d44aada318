"""LoRA, the method to try first: each adapted weight gets a low-rank update, `(alpha / r) B A x`.

Shapes: S slots, N rows, T tokens, I in_features, O out_features, R rank (the largest of the slots).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from graft.methods._lora_family import LoraFamily, pair_of
from graft.methods.base import METHODS, Method
from graft.methods.layerwise import FrozenLayer

if TYPE_CHECKING:
    import torch

    from graft.methods.base import AdapterTensors
    from graft.methods.routing import GroupRouting


@METHODS.register
class LoraMethod(LoraFamily):
    """Low-rank adaptation.

    Reference:
        LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685; rank-stabilised
        scaling from arXiv 2312.03732; LoRA+ from arXiv 2402.12354.
    """

    type: Literal["lora"] = "lora"

    servable: ClassVar[frozenset[str]] = frozenset({"native", "vllm"})
    zero_stages: ClassVar[frozenset[int]] = frozenset({0, 1, 2, 3})
    peft_only_fields: ClassVar[frozenset[str]] = frozenset({"target_parameters", "eva_config"})

    @classmethod
    def stack(
        cls,
        slots: list[dict[str, torch.Tensor]],
        methods: tuple[Method, ...],
        dtype: torch.dtype,
        layer: FrozenLayer,
    ) -> dict[str, torch.Tensor]:
        """A and B transposed, padded with zeros to the largest rank; the scale is folded into B."""
        from graft.methods._low_rank import factors

        a, b = zip(*map(pair_of, slots), strict=True)
        return factors(a, b, [m.scale for m in methods if isinstance(m, LoraFamily)], dtype)

    @classmethod
    def delta(
        cls,
        x_NTI: torch.Tensor,
        base_NTO: torch.Tensor,
        stacked: dict[str, torch.Tensor],
        routing: GroupRouting,
    ) -> torch.Tensor:
        """The scaled product."""
        from graft.methods._low_rank import low_rank_product

        x_NTI = cls.dropped(x_NTI, routing)
        return low_rank_product(x_NTI, stacked["a_SIR"], stacked["b_SRO"], routing)

    def expert_refusal(self) -> str | None:
        """Experts take plain pairs alone: their tokens come one by one, as the router sends them.

        PEFT has no dropout there either.
        """
        if self.lora_dropout:
            return "there method.lora_dropout must be 0"
        if self.init_lora_weights != "default":
            return "there method.init_lora_weights must be default"
        return None

    def merge_delta(self, tensors: dict[str, torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
        """`(alpha / r) B A`."""
        return self.update(tensors)

    def to_peft(
        self, tensors: AdapterTensors, base: str
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """PEFT's `LoraConfig` and its tensor names; fused experts as `target_parameters`."""
        from graft.methods._expert_files import join_experts

        return join_experts(*super().to_peft(tensors, base))

    @classmethod
    def from_peft(
        cls, config: dict[str, Any], state: dict[str, torch.Tensor]
    ) -> tuple[Method, AdapterTensors]:
        """Reads an adapter of one rank; variants that change the mathematics are refused.

        Raises:
            AdapterError: A feature outside plain LoRA, unknown tensor names, or shapes unlike `r`.
        """
        from graft.methods._expert_files import split_experts

        return super().from_peft(*split_experts(config, state))

    @classmethod
    def reads_peft(cls, config: dict[str, Any]) -> bool:
        """PEFT's LORA without a magnitude vector."""
        return super().reads_peft(config) and not config.get("use_dora")
