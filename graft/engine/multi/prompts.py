"""Slots of the methods with virtual tokens.

Shapes: S slots, P virtual tokens (the most of the slots), E hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from graft.core.errors import AdapterError, ModelError
from graft.core.seeds import derive_seed
from graft.engine.kv_cache import require_full_attention
from graft.engine.multi.attention import attention_kernel
from graft.engine.multi.layer import ActiveRouting
from graft.engine.multi.prefix import Prefix, RecordingCache
from graft.engine.multi.routing import Routing
from graft.methods.virtual import SITE, BaseShape, VirtualMethod
from graft.models import load_tokenizer_in

_MODULE = "virtual_tokens"


def base_shape(base: PreTrainedModel) -> BaseShape:
    """Sizes of a base that virtual tokens, and a cache of keys and values, depend on."""
    config = base.config.get_text_config()
    heads = config.num_attention_heads
    return BaseShape(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab_size=int(base.get_input_embeddings().num_embeddings),
    )


class FrozenModel:
    """The bare base, as virtual tokens meet it; see `graft.methods.virtual.FrozenBase`."""

    def __init__(self, base: PreTrainedModel, active: ActiveRouting) -> None:
        self._base = base
        self._active = active

    @cached_property
    def shape(self) -> BaseShape:
        """Sizes of the base."""
        return base_shape(self._base)

    @torch.no_grad()
    def embed(self, token_ids: list[int]) -> torch.Tensor:
        """Input embeddings of tokens, `[tokens, hidden_size]`."""
        ids = torch.tensor(token_ids, device=self._base.device)
        embeddings: torch.Tensor = self._base.get_input_embeddings()(ids)
        return embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))

    @torch.no_grad()
    def key_values(self, token_ids: list[int]) -> torch.Tensor:
        """Keys and values of a text, `[num_layers, 2, num_kv_heads, tokens, head_dim]`."""
        ids = torch.tensor(token_ids, device=self._base.device)
        (found,) = self.run(self._base.get_input_embeddings()(ids)[None])
        return found.to(torch.promote_types(found.dtype, torch.float32))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens.

        Raises:
            ModelError: The base was not loaded from a folder with its tokenizer.
        """
        folder = Path(self._base.config._name_or_path or "/nonexistent")
        if not folder.is_dir():
            raise ModelError(
                "method.init_tokens: text needs the tokenizer of the base, which was not loaded "
                "from a folder; load it from one, or set init_tokens to sample_vocab"
            )
        ids: list[int] = load_tokenizer_in(folder).encode(
            text, add_special_tokens=False, split_special_tokens=True
        )
        return ids

    def run(self, embeddings_SPE: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Reads rows of input embeddings; of each returns keys and values in every layer."""
        self._active.slots, self._active.streams = [], {}
        self._active.num_rows = embeddings_SPE.shape[0]
        cache = RecordingCache()
        with attention_kernel(embeddings_SPE.shape[1], embeddings_SPE.device):
            self._base.get_decoder()(
                inputs_embeds=embeddings_SPE, past_key_values=cache, use_cache=True
            )
        return cache.key_values().unbind(2)


class _VirtualTokens(nn.Module):
    """One slot's parameters, and what they come to.

    The parameters are its own and are used in its `forward`, so that ZeRO-3 gathers them with it.
    """

    def __init__(
        self, method: VirtualMethod, shape: BaseShape, tensors: dict[str, torch.Tensor]
    ) -> None:
        super().__init__()
        self.method = method
        self._shape = shape
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def forward(self, dtype: torch.dtype) -> torch.Tensor:
        tensors: dict[str, torch.Tensor] = dict(self.named_parameters())
        if self.method.source == "embeddings":
            return self.method.embeddings(tensors).to(dtype)
        return self.method.key_values(tensors, self._shape).to(dtype)


class PromptSlots:
    """Makes each slot's keys and values; the bare base computes those of input embeddings.

    Args:
        base: The base.
        active: What its wrapped layers see of a forward pass.
    """

    def __init__(self, base: PreTrainedModel, active: ActiveRouting) -> None:
        self._base = base
        self._frozen = FrozenModel(base, active)
        self._slots: dict[str, _VirtualTokens] = {}
        self._kept: dict[str, torch.Tensor] = {}

    def fresh(
        self,
        method: VirtualMethod,
        seed: int,
        moments: Mapping[str, torch.Tensor] | None = None,
    ) -> dict[str, dict[str, torch.Tensor]]:
        """Draws initial tensors.

        Raises:
            ModelError: The base has no cache of keys and values.
        """
        self._require_cache(method)
        generator = torch.Generator().manual_seed(derive_seed("init", seed, SITE))
        return {SITE: method.init(self._frozen, generator)}

    def require_fit(
        self, name: str, method: VirtualMethod, tensors: Mapping[str, Mapping[str, torch.Tensor]]
    ) -> None:
        """Refuses tensors of another base or of other settings.

        Raises:
            AdapterError: They do not fit.
            ModelError: The base has no cache of keys and values.
        """
        self._require_cache(method)
        wanted = method.shapes(self._frozen.shape)
        given = {key: tuple(value.shape) for key, value in tensors.get(SITE, {}).items()}
        if set(tensors) != {SITE} or set(given) != set(wanted):
            raise AdapterError(
                f"adapter {name!r} does not fit method {method.type}: it has the tensors "
                f"{', '.join(sorted(given)) or 'of another method'}, its settings name "
                f"{', '.join(sorted(wanted))}; a published adapter has no encoder: to train it on, "
                "set the method's encoder or projection to none"
            )
        for key, shape in wanted.items():
            if given[key] != shape:
                raise AdapterError(
                    f"adapter {name!r} does not fit the base: {SITE}.{key} should be {shape}, "
                    f"is {given[key]}"
                )

    def _require_cache(self, method: VirtualMethod) -> None:
        require_full_attention(
            self._base,
            f"virtual tokens (method {method.type}) need a KV cache with full attention in every "
            "layer: choose such a base, or method lora",
        )
        settings = inspect.signature(self._base.get_decoder().forward).parameters
        if "position_ids" not in settings or getattr(self._base.config, "alibi", False):
            raise ModelError(
                f"model type {self._base.config.model_type!r} tells tokens apart by their columns, "
                f"and virtual tokens (method {method.type}) stand in columns of their own: choose "
                "another base, or method lora"
            )

    def add(
        self,
        name: str,
        method: VirtualMethod,
        tensors: Mapping[str, dict[str, torch.Tensor]],
        *,
        trainable: bool,
    ) -> None:
        """Puts a slot on."""
        module = _VirtualTokens(method, self._frozen.shape, tensors[SITE])
        for key, parameter in module.named_parameters():
            parameter.requires_grad_(trainable and key not in method.frozen)
        if not self._slots:
            self._base.add_module(_MODULE, nn.ModuleDict())
        self._base.get_submodule(_MODULE).add_module(name, module)
        self._slots[name] = module

    def remove(self, name: str) -> None:
        """Takes a slot off."""
        del self._slots[name]
        self._kept.pop(name, None)
        delattr(self._base.get_submodule(_MODULE), name)
        if not self._slots:
            delattr(self._base, _MODULE)

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """One slot's parameters, `site.tensor` → parameter."""
        return {f"{SITE}.{key}": value for key, value in self._slots[name].named_parameters()}

    def weights_changed(self) -> None:
        """Drops what was computed from weights."""
        self._kept.clear()

    def num_virtual_tokens(self, name: str | None) -> int:
        """Virtual tokens before each row of a slot; 0 of all others."""
        module = self._slots.get(name) if name is not None else None
        return 0 if module is None else module.method.num_virtual_tokens

    def prefix(self, routing: Routing) -> Prefix | None:
        """Returns what the rows of a forward pass attend to first; None where no slot has any."""
        names = [name for name in routing.slots if name is not None and name in self._slots]
        if not names:
            return None
        made = self._key_values(names)
        return Prefix([made.get(name or "") for name in routing.slots], routing.num_rows)

    def _key_values(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Those of each slot; kept until weights change, unless gradients are wanted."""
        is_kept = not torch.is_grad_enabled()
        found = {name: self._kept[name] for name in names if is_kept and name in self._kept}
        dtype = self._base.dtype
        made = {name: self._slots[name](dtype) for name in names if name not in found}
        embedded = [name for name in made if self._slots[name].method.source == "embeddings"]
        if embedded:
            padded = pad_sequence([made[name] for name in embedded], batch_first=True)
            for name, read in zip(embedded, self._frozen.run(padded), strict=True):
                made[name] = read[..., : made[name].shape[0], :]
        if is_kept:
            self._kept.update(made)
        return found | made
