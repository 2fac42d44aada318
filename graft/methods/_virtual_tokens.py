"""What the methods with virtual tokens share: first tokens, encoders, and PEFT's files.

Tensors of an encoder are named as PEFT's modules are, with `_` for `.`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from graft.core.errors import AdapterError, ConfigError
from graft.methods.virtual import SITE

if TYPE_CHECKING:
    import torch

    from graft.methods.base import AdapterTensors
    from graft.methods.virtual import FrozenBase

EMBEDDING = "embedding"
"""The tensor that every one of them has."""
PEFT_FIELDS = frozenset(
    {
        "token_dim",
        "num_transformer_submodules",
        "num_attention_heads",
        "num_layers",
        "encoder_hidden_size",
    }
)
"""Fields of PEFT's configs that only repeat what the saved tensor shows, or the base."""
_STATE = "prompt_embeddings"

Shapes = dict[str, tuple[int, ...]]


def require_text_where_asked(init_tokens: str, init_text: str | None) -> None:
    """Refuses `init_tokens: text` without a text, and a text that nothing reads.

    Raises:
        ValueError: For the recipe's message.
    """
    if (init_tokens == "text") != (init_text is not None):
        raise ValueError("init_tokens: text and init_text belong together; give both or neither")


def first_tokens(
    base: FrozenBase, generator: torch.Generator, count: int, text: str | None
) -> list[int]:
    """Ids of `count` tokens: of a text, cut or repeated as PEFT does, or drawn from the vocabulary.

    Raises:
        ConfigError: The text has no token.
    """
    if text is None:
        import torch

        return torch.randint(base.shape.vocab_size, (count,), generator=generator).tolist()
    ids = base.encode(text)
    if not ids:
        raise ConfigError(f"method.init_text: {text!r} has no token; write a few words")
    return (ids * math.ceil(count / len(ids)))[:count]


def linear_shapes(name: str, sizes: Sequence[int]) -> Shapes:
    """Shapes of linear layers from size to size: `name_0`, `name_2`, ..., activations between."""
    found: Shapes = {}
    for index, (before, after) in enumerate(pairwise(sizes)):
        found[f"{name}_{2 * index}_weight"] = (after, before)
        found[f"{name}_{2 * index}_bias"] = (after,)
    return found


def fresh_encoder(shapes: Shapes, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Draws embeddings from a standard normal and layers as torch's own modules do, as PEFT does.

    A linear layer is uniform in ±1/sqrt(in_features), an LSTM in ±1/sqrt(hidden_size).
    """
    import torch

    found = {}
    for name, shape in shapes.items():
        if name == EMBEDDING:
            found[name] = torch.randn(shape, generator=generator)
            continue
        fan = shape[0] // 4 if "lstm" in name else shapes[name.replace("bias", "weight")][1]
        bound = 1.0 / math.sqrt(fan)
        found[name] = torch.empty(shape).uniform_(-bound, bound, generator=generator)
    return found


def linear(tensors: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    """Applies one linear layer of an encoder."""
    from torch.nn import functional

    return functional.linear(x, tensors[f"{name}_weight"], tensors[f"{name}_bias"])


def projection_shapes(count: int, size: int, hidden_size: int, out: int) -> Shapes:
    """Prefix tuning's projection: an embedding, and two layers with a tanh between."""
    layers = linear_shapes("transform", (size, hidden_size, out))
    return {EMBEDDING: (count, size), **layers}


def project(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Applies it, or returns the embedding where there is none."""
    x = tensors[EMBEDDING]
    if "transform_0_weight" not in tensors:
        return x
    return linear(tensors, "transform_2", linear(tensors, "transform_0", x).tanh())


def as_key_values(flat_PF: torch.Tensor, num_layers: int, num_kv_heads: int) -> torch.Tensor:
    """PEFT's flat form as `[num_layers, 2, num_kv_heads, tokens, head_dim]`."""
    split = flat_PF.view(flat_PF.shape[0], num_layers, 2, num_kv_heads, -1)
    return split.permute(1, 2, 3, 0, 4)


def as_flat(key_values: torch.Tensor) -> torch.Tensor:
    """The inverse of `as_key_values`, `[tokens, num_layers * 2 * num_kv_heads * head_dim]`."""
    return key_values.permute(3, 0, 1, 2, 4).flatten(1)


def to_state(virtual_tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """PEFT's state dict: what the encoder puts out, without the encoder."""
    return {_STATE: virtual_tokens.detach()}


def from_state(config: dict[str, Any], state: dict[str, torch.Tensor]) -> AdapterTensors:
    """Reads PEFT's state dict.

    Raises:
        AdapterError: Other tensors, another number of tokens, or an encoder-decoder's.
    """
    if set(state) != {_STATE}:
        odd = sorted(set(state) ^ {_STATE})[0]
        raise AdapterError(
            f"adapter_model.safetensors: expected the one tensor {_STATE!r} for "
            f"{config['peft_type']}; first difference: {odd!r}"
        )
    if config.get("num_transformer_submodules") not in (None, 1):
        raise AdapterError(
            "adapter_config.json: num_transformer_submodules="
            f"{config['num_transformer_submodules']!r} is of an encoder-decoder; only decoders "
            "are read: give an adapter of a causal model"
        )
    embedding = state[_STATE]
    if embedding.ndim != 2 or embedding.shape[0] != config.get("num_virtual_tokens"):
        raise AdapterError(
            f"adapter_config.json says num_virtual_tokens={config.get('num_virtual_tokens')!r} "
            f"but {_STATE} has shape {tuple(embedding.shape)}"
        )
    return {SITE: {EMBEDDING: embedding}}


def prefix_files(
    num_virtual_tokens: int, tensors: AdapterTensors, base: str
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """PEFT's files of a prefix; a projection is applied, sizes are left to PEFT and the base."""
    import torch
    from peft import PrefixTuningConfig

    with torch.no_grad():
        flat = project(tensors[SITE])
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
        num_virtual_tokens=num_virtual_tokens,
        num_transformer_submodules=1,
        prefix_projection=False,
    )
    return plain_config(config), to_state(flat)


def plain_config(config: Any) -> dict[str, Any]:
    """PEFT's config object as the content of `adapter_config.json`."""
    return {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in config.to_dict().items()
    }
