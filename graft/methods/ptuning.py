"""P-tuning: prompt tuning whose embeddings come out of a small network while training.

The network makes short prompts easier to train at usual learning rates, and is gone afterwards:
what is served and published is what it puts out. With `deep` the prompts stand in every layer
(P-tuning v2), which is prefix tuning in other words, and such an adapter is published as one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from graft.core.spaces import Choice, Float, Space
from graft.methods._virtual_tokens import (
    EMBEDDING,
    PEFT_FIELDS,
    as_key_values,
    fresh_encoder,
    from_state,
    linear,
    linear_shapes,
    plain_config,
    prefix_files,
    project,
    projection_shapes,
    to_state,
)
from graft.methods.base import METHODS, Method
from graft.methods.virtual import SITE, VirtualMethod

if TYPE_CHECKING:
    import torch

    from graft.methods.base import AdapterTensors
    from graft.methods.virtual import BaseShape, FrozenBase


@METHODS.register
class PtuningMethod(VirtualMethod):
    """P-tuning, and P-tuning v2.

    Reference:
        GPT Understands, Too, arXiv 2103.10385; P-Tuning v2: Prompt Tuning Can Be Comparable to
        Fine-tuning Universally Across Scales and Tasks, arXiv 2110.07602.
    """

    type: Literal["ptuning"] = "ptuning"
    encoder: Literal["mlp", "lstm", "none"] = "mlp"
    """The network that makes the virtual tokens while training."""
    encoder_hidden_size: int | None = Field(None, ge=1)
    """Of the network; None is the size of an embedding (with `deep`, of a key)."""
    encoder_num_layers: int = Field(2, ge=1)
    """Layers of an `lstm`."""
    deep: bool = False
    """Virtual tokens of their own in every layer, instead of input embeddings."""

    default_lr: ClassVar[float] = 1e-3
    zero_stages: ClassVar[frozenset[int]] = frozenset({0, 1, 2, 3})
    peft_only_fields: ClassVar[frozenset[str]] = PEFT_FIELDS | {
        "encoder_reparameterization_type",
        "encoder_dropout",
    }

    @model_validator(mode="after")
    def deep_prompts_have_no_order(self) -> PtuningMethod:
        """Refuses an LSTM over deep prompts, which neither paper has."""
        if self.deep and self.encoder == "lstm":
            raise ValueError("deep takes encoder mlp or none, not lstm; set encoder to one of them")
        return self

    @property
    def source(self) -> Literal["embeddings", "key_values"]:
        """Deep prompts are keys and values."""
        return "key_values" if self.deep else "embeddings"

    @classmethod
    def search_space(cls) -> dict[str, Space]:
        """Lengths and rates that hold the papers' own, from v1's 1e-4 to v2's 1e-2."""
        return {
            "method.num_virtual_tokens": Choice(values=(8, 20, 50, 100)),
            "train.lr": Float(low=1e-4, high=1e-2, log=True),
        }

    def shapes(self, base: BaseShape) -> dict[str, tuple[int, ...]]:
        """An embedding of each virtual token, and the layers of the encoder."""
        count = self.num_virtual_tokens
        size = base.kv_size if self.deep else base.hidden_size
        out = 2 * base.num_layers * base.kv_size if self.deep else base.hidden_size
        hidden_size = self.encoder_hidden_size or size
        if self.encoder == "none":
            return {EMBEDDING: (count, out)}
        if self.deep:
            return projection_shapes(count, size, hidden_size, out)
        sizes: tuple[int, ...] = (size, hidden_size, hidden_size, out)
        if self.encoder == "lstm":
            sizes = (2 * hidden_size, 2 * hidden_size, out)
        return {
            EMBEDDING: (count, size),
            **(self._lstm_shapes(size, hidden_size) if self.encoder == "lstm" else {}),
            **linear_shapes("mlp_head", sizes),
        }

    def _lstm_shapes(self, size: int, hidden_size: int) -> dict[str, tuple[int, ...]]:
        """Torch's names and order: of each layer forward, then of each layer backward."""
        found: dict[str, tuple[int, ...]] = {}
        for layer in range(self.encoder_num_layers):
            before = 2 * hidden_size if layer else size
            for way in ("", "_reverse"):
                found[f"lstm_head_weight_ih_l{layer}{way}"] = (4 * hidden_size, before)
                found[f"lstm_head_weight_hh_l{layer}{way}"] = (4 * hidden_size, hidden_size)
                found[f"lstm_head_bias_ih_l{layer}{way}"] = (4 * hidden_size,)
                found[f"lstm_head_bias_hh_l{layer}{way}"] = (4 * hidden_size,)
        return found

    def init(self, base: FrozenBase, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """As PEFT's encoder starts."""
        return fresh_encoder(self.shapes(base.shape), generator)

    def embeddings(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """The encoder's output."""
        x = tensors[EMBEDDING]
        if self.encoder == "none":
            return x
        if self.encoder == "lstm":
            x = linear(tensors, "mlp_head_0", self._lstm(tensors, x)).relu()
            return linear(tensors, "mlp_head_2", x)
        for layer in ("mlp_head_0", "mlp_head_2"):
            x = linear(tensors, layer, x).relu()
        return linear(tensors, "mlp_head_4", x)

    def _lstm(self, tensors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        import torch

        weights = [tensors[name] for name in self._lstm_shapes(0, 0)]
        start = x.new_zeros(2 * self.encoder_num_layers, 1, weights[1].shape[1])
        layers = self.encoder_num_layers
        out, _, _ = torch.lstm(
            x[None], (start, start), weights, True, layers, 0.0, False, True, True
        )
        return out[0]

    def key_values(self, tensors: dict[str, torch.Tensor], base: BaseShape) -> torch.Tensor:
        """Deep prompts as the layers take them."""
        return as_key_values(project(tensors), base.num_layers, base.num_kv_heads)

    def to_peft(
        self, tensors: AdapterTensors, base: str
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """PEFT's `PromptEncoderConfig`, of deep prompts its `PrefixTuningConfig`.

        The encoder is applied and left out, as PEFT does.
        """
        if self.deep:
            return prefix_files(self.num_virtual_tokens, tensors, base)
        import torch
        from peft import PromptEncoderConfig

        with torch.no_grad():
            embeddings = self.embeddings(tensors[SITE])
        config = PromptEncoderConfig(
            task_type="CAUSAL_LM",
            base_model_name_or_path=base,
            inference_mode=True,
            num_virtual_tokens=self.num_virtual_tokens,
            token_dim=embeddings.shape[1],
            num_transformer_submodules=1,
            encoder_reparameterization_type="LSTM" if self.encoder == "lstm" else "MLP",
            encoder_hidden_size=self.encoder_hidden_size,
            encoder_num_layers=self.encoder_num_layers,
        )
        return plain_config(config), to_state(embeddings)

    @classmethod
    def reads_peft(cls, config: dict[str, Any]) -> bool:
        """`P_TUNING`; deep prompts are read back as prefix tuning."""
        return config.get("peft_type") == "P_TUNING"

    @classmethod
    def from_peft(
        cls, config: dict[str, Any], state: dict[str, torch.Tensor]
    ) -> tuple[Method, AdapterTensors]:
        """Reads the virtual tokens; no encoder was saved, so `encoder` is `none`.

        Raises:
            AdapterError: Other tensors or shapes than the config says.
        """
        tensors = from_state(config, state)
        settings = {"num_virtual_tokens": config["num_virtual_tokens"], "encoder": "none"}
        return cls.model_validate(settings), tensors
