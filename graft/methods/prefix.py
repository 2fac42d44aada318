"""Prefix tuning: keys and values of a few virtual tokens in every layer are what is trained.

More to learn with than prompt tuning at the same length, and no virtual token passes through the
base. A projection is a help of training alone: checkpoints keep it, a published adapter holds the
keys and values that it came to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from graft.core.spaces import Choice, Float, Space
from graft.methods._virtual_tokens import (
    EMBEDDING,
    PEFT_FIELDS,
    as_flat,
    as_key_values,
    first_tokens,
    fresh_encoder,
    from_state,
    prefix_files,
    project,
    projection_shapes,
    require_text_where_asked,
)
from graft.methods.base import METHODS, Method
from graft.methods.virtual import VirtualMethod

if TYPE_CHECKING:
    import torch

    from graft.methods.base import AdapterTensors
    from graft.methods.virtual import BaseShape, FrozenBase


@METHODS.register
class PrefixMethod(VirtualMethod):
    """Prefix tuning.

    Reference:
        Prefix-Tuning: Optimizing Continuous Prompts for Generation, arXiv 2101.00190; real tokens
        to start from as in its section 7.4.
    """

    type: Literal["prefix"] = "prefix"
    init_tokens: Literal["sample_vocab", "text", "random", "zero"] = "sample_vocab"
    """Start as the base's keys and values of drawn tokens or of a text, as noise, or as zeros."""
    init_text: str | None = Field(None, min_length=1)
    """The text of `init_tokens: text`, cut or repeated to `num_virtual_tokens`."""
    prefix_projection: bool = False
    """Train a small network that makes the prefix; needs `init_tokens: random` or `zero`."""
    encoder_hidden_size: int | None = Field(None, ge=1)
    """Of that network; None is the size of a key."""

    default_lr: ClassVar[float] = 1e-3
    zero_stages: ClassVar[frozenset[int]] = frozenset({0, 1, 2, 3})
    peft_only_fields: ClassVar[frozenset[str]] = PEFT_FIELDS | {"init_weights"}

    @model_validator(mode="after")
    def start_is_possible(self) -> PrefixMethod:
        """Refuses a start that its other settings rule out."""
        require_text_where_asked(self.init_tokens, self.init_text)
        if self.prefix_projection and self.init_tokens in ("sample_vocab", "text"):
            raise ValueError(
                f"prefix_projection makes the prefix itself, so it cannot start as init_tokens "
                f"{self.init_tokens!r}; set init_tokens to random or zero, or leave the projection"
            )
        return self

    @property
    def source(self) -> Literal["embeddings", "key_values"]:
        """Keys and values."""
        return "key_values"

    @classmethod
    def search_space(cls) -> dict[str, Space]:
        """Lengths of arXiv 2101.00190, figure 4; rates around PEFT's published 1e-3 and 5e-3."""
        return {
            "method.num_virtual_tokens": Choice(values=(10, 20, 50, 100)),
            "train.lr": Float(low=3e-4, high=3e-2, log=True),
        }

    def shapes(self, base: BaseShape) -> dict[str, tuple[int, ...]]:
        """The flat prefix `[num_virtual_tokens, num_layers * 2 * kv_size]`, or what projects it."""
        width = 2 * base.num_layers * base.kv_size
        if not self.prefix_projection:
            return {EMBEDDING: (self.num_virtual_tokens, width)}
        hidden_size = self.encoder_hidden_size or base.kv_size
        return projection_shapes(self.num_virtual_tokens, base.kv_size, hidden_size, width)

    def init(self, base: FrozenBase, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """What the base itself computes for tokens, or PEFT's noise or zeros."""
        import torch

        if self.init_tokens in ("sample_vocab", "text"):
            ids = first_tokens(base, generator, self.num_virtual_tokens, self.init_text)
            return {EMBEDDING: as_flat(base.key_values(ids)).float().cpu()}
        tensors = fresh_encoder(self.shapes(base.shape), generator)
        if self.init_tokens == "zero":
            last = ("transform_2_weight", "transform_2_bias")
            for name in last if self.prefix_projection else (EMBEDDING,):
                tensors[name] = torch.zeros_like(tensors[name])
        return tensors

    def key_values(self, tensors: dict[str, torch.Tensor], base: BaseShape) -> torch.Tensor:
        """The prefix as the layers take it."""
        return as_key_values(project(tensors), base.num_layers, base.num_kv_heads)

    def to_peft(
        self, tensors: AdapterTensors, base: str
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """PEFT's `PrefixTuningConfig`; a projection is applied and left out."""
        return prefix_files(self.num_virtual_tokens, tensors, base)

    @classmethod
    def reads_peft(cls, config: dict[str, Any]) -> bool:
        """`PREFIX_TUNING`."""
        return config.get("peft_type") == "PREFIX_TUNING"

    @classmethod
    def from_peft(
        cls, config: dict[str, Any], state: dict[str, torch.Tensor]
    ) -> tuple[Method, AdapterTensors]:
        """Reads the flat prefix; whether a projection once made it changes nothing any more.

        Raises:
            AdapterError: Other tensors or shapes than the config says.
        """
        tensors = from_state(config, state)
        return cls.model_validate({"num_virtual_tokens": config["num_virtual_tokens"]}), tensors
