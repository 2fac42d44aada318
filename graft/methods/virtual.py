"""Methods that give every row virtual tokens to attend to; no layer of the base is touched.

Virtual tokens stand before a row's first token. In a causal model they see only themselves, so
whatever their source they come down to keys and values in every layer, the same for all rows of a
slot: the engine makes those once a forward pass and slot, and real tokens start at position
`num_virtual_tokens`.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, Protocol

from pydantic import Field

from graft.methods.base import Method

if TYPE_CHECKING:
    import torch

SITE = "prompt"
"""The one site name that their tensors stand under."""


class BaseShape(NamedTuple):
    """Sizes of a base that virtual tokens depend on."""

    num_layers: int
    hidden_size: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    @property
    def kv_size(self) -> int:
        """Features of a token's key in one layer, all heads together."""
        return self.num_kv_heads * self.head_dim


class FrozenBase(Protocol):
    """What a method may ask of the frozen base."""

    @property
    def shape(self) -> BaseShape:
        """Its sizes."""

    def embed(self, token_ids: list[int]) -> torch.Tensor:
        """Input embeddings of tokens, `[tokens, hidden_size]`, at least fp32."""

    def key_values(self, token_ids: list[int]) -> torch.Tensor:
        """Keys and values of a text from position 0 on, at least fp32.

        The shape is `[num_layers, 2, num_kv_heads, tokens, head_dim]`.
        """

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""


class VirtualMethod(Method):
    """A method whose slots are virtual tokens.

    Reparameterisations are of training alone: `to_peft` writes what they put out, as PEFT does, so
    an adapter read back has the virtual tokens themselves as its tensors. Checkpoints keep all.
    """

    num_virtual_tokens: int = Field(20, ge=1)
    """Virtual tokens before each row."""

    packable: ClassVar[bool] = True
    servable: ClassVar[frozenset[str]] = frozenset({"native"})
    quantized_base: ClassVar[frozenset[str]] = frozenset({"int8", "nf4"})
    is_identity_at_start: ClassVar[bool] = False

    @property
    def source(self) -> Literal["embeddings", "key_values"]:
        """Which of the two functions below gives them."""
        return "embeddings"

    @abstractmethod
    def shapes(self, base: BaseShape) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each of its tensors."""

    @abstractmethod
    def init(self, base: FrozenBase, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Makes its fp32 tensors; the same generator state, the same tensors."""

    def embeddings(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """Returns input embeddings of the virtual tokens, `[num_virtual_tokens, hidden_size]`."""
        raise TypeError(f"method {self.type!r} gives keys and values, not embeddings")

    def key_values(self, tensors: dict[str, torch.Tensor], base: BaseShape) -> torch.Tensor:
        """Returns their keys and values.

        The shape is `[num_layers, 2, num_kv_heads, num_virtual_tokens, head_dim]`.
        """
        raise TypeError(f"method {self.type!r} gives embeddings, not keys and values")
