"""Prompt tuning: a few input embeddings before each row are all that is trained.

The smallest adapter there is, at a few kilobytes a task; it wants a much higher learning rate than
LoRA, and a base of some size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from graft.core.spaces import Choice, Float, Space
from graft.methods._virtual_tokens import (
    EMBEDDING,
    PEFT_FIELDS,
    first_tokens,
    from_state,
    plain_config,
    require_text_where_asked,
    to_state,
)
from graft.methods.base import METHODS, Method
from graft.methods.virtual import SITE, VirtualMethod

if TYPE_CHECKING:
    import torch

    from graft.methods.base import AdapterTensors
    from graft.methods.virtual import BaseShape, FrozenBase


@METHODS.register
class PromptMethod(VirtualMethod):
    """Prompt tuning.

    Reference:
        The Power of Scale for Parameter-Efficient Prompt Tuning, arXiv 2104.08691.
    """

    type: Literal["prompt"] = "prompt"
    init_tokens: Literal["sample_vocab", "text", "random"] = "sample_vocab"
    """Virtual tokens start as tokens drawn from the vocabulary, as a text, or as normal noise."""
    init_text: str | None = Field(None, min_length=1)
    """The text of `init_tokens: text`, cut or repeated to `num_virtual_tokens`."""

    default_lr: ClassVar[float] = 1e-3
    zero_stages: ClassVar[frozenset[int]] = frozenset({0, 1, 2, 3})
    peft_only_fields: ClassVar[frozenset[str]] = PEFT_FIELDS | {
        "prompt_tuning_init",
        "prompt_tuning_init_text",
        "tokenizer_name_or_path",
        "tokenizer_kwargs",
    }

    @model_validator(mode="after")
    def text_is_given_where_asked(self) -> PromptMethod:
        """Refuses `init_tokens: text` without a text, and a text that nothing reads."""
        require_text_where_asked(self.init_tokens, self.init_text)
        return self

    @classmethod
    def search_space(cls) -> dict[str, Space]:
        """Lengths of arXiv 2104.08691, figure 3a; rates from PEFT's published 1e-3 to its 0.3."""
        return {
            "method.num_virtual_tokens": Choice(values=(5, 20, 100)),
            "train.lr": Float(low=1e-3, high=0.3, log=True),
        }

    def shapes(self, base: BaseShape) -> dict[str, tuple[int, ...]]:
        """The embeddings, `[num_virtual_tokens, hidden_size]`."""
        return {EMBEDDING: (self.num_virtual_tokens, base.hidden_size)}

    def init(self, base: FrozenBase, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Embeddings of tokens as they are in the base; `random` is PEFT's standard normal."""
        import torch

        if self.init_tokens == "random":
            shape = self.shapes(base.shape)[EMBEDDING]
            return {EMBEDDING: torch.randn(shape, generator=generator)}
        ids = first_tokens(base, generator, self.num_virtual_tokens, self.init_text)
        return {EMBEDDING: base.embed(ids).float().cpu()}

    def embeddings(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """The tensor itself."""
        return tensors[EMBEDDING]

    def to_peft(
        self, tensors: AdapterTensors, base: str
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """PEFT's `PromptTuningConfig`."""
        from peft import PromptTuningConfig

        embedding = tensors[SITE][EMBEDDING]
        config = PromptTuningConfig(
            task_type="CAUSAL_LM",
            base_model_name_or_path=base,
            inference_mode=True,
            num_virtual_tokens=self.num_virtual_tokens,
            token_dim=embedding.shape[1],
            num_transformer_submodules=1,
            prompt_tuning_init=self.init_tokens.upper(),
            prompt_tuning_init_text=self.init_text,
            tokenizer_name_or_path=(base or "unnamed") if self.init_text else None,
        )
        return plain_config(config), to_state(embedding)

    @classmethod
    def reads_peft(cls, config: dict[str, Any]) -> bool:
        """`PROMPT_TUNING`."""
        return config.get("peft_type") == "PROMPT_TUNING"

    @classmethod
    def from_peft(
        cls, config: dict[str, Any], state: dict[str, torch.Tensor]
    ) -> tuple[Method, AdapterTensors]:
        """Reads the same back; how the prompt was once initialised changes nothing any more.

        Raises:
            AdapterError: Other tensors or shapes than the config says.
        """
        tensors = from_state(config, state)
        started = str(config.get("prompt_tuning_init", "RANDOM")).rpartition(".")[2].lower()
        settings = {
            "num_virtual_tokens": config.get("num_virtual_tokens"),
            "init_tokens": started,
            "init_text": config.get("prompt_tuning_init_text") if started == "text" else None,
        }
        return cls.model_validate(settings), tensors
