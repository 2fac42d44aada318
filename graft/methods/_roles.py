"""Which part a linear layer plays in a transformer block, by the names that models give it."""

from __future__ import annotations

from collections.abc import Iterable

from graft.core.errors import ConfigError
from graft.methods.base import FusedSize

KEYS_AND_VALUES = ("k_proj", "v_proj", "key", "value", "key_proj", "value_proj")
"""Separate key and value projections of self-attention."""
FUSED_ATTENTION_INPUTS = ("qkv_proj", "query_key_value", "Wqkv", "c_attn")
"""Queries, keys and values from one layer."""
ATTENTION_OUTPUTS = (
    "o_proj",
    "out_proj",
    "attn.c_proj",
    "attn.dense",
    "self_attn.dense",
    "attention.dense",
    "self_attention.dense",
)
"""What an attention block puts out."""
FEEDFORWARD_OUTPUTS = ("down_proj", "fc2", "mlp.c_proj", "dense_4h_to_h", "fc_out", "w2")
"""What a feed-forward block puts out."""
FEEDFORWARD = (
    *FEEDFORWARD_OUTPUTS,
    "up_proj",
    "gate_proj",
    "gate_up_proj",
    "fc1",
    "mlp.c_fc",
    "dense_h_to_4h",
    "fc_in",
    "w1",
    "w3",
)
"""All layers of a feed-forward block."""


def ends_with(path: str, ending: str) -> bool:
    """Tells whether a module path is, or ends with, whole names such as `mlp.c_proj`."""
    return path == ending or path.endswith(f".{ending}")


def endings_found(paths: Iterable[str], endings: Iterable[str]) -> tuple[str, ...]:
    """Returns those endings that some path has."""
    known = tuple(paths)
    return tuple(e for e in endings if any(ends_with(path, e) for path in known))


def usual_endings(paths: Iterable[str], endings: Iterable[str], *, field: str) -> tuple[str, ...]:
    """Returns those endings that some path has.

    Raises:
        ConfigError: None has; the message names what may be given.
    """
    known = tuple(paths)
    if found := endings_found(known, endings):
        return found
    leaves = sorted({path.rpartition(".")[2] for path in known})
    raise ConfigError(
        f"method.{field}: none of this model's layers has a usual name; give that of the block's "
        f"last one among: {', '.join(leaves)}"
    )


def module_paths(linears: dict[str, tuple[int, int]]) -> list[str]:
    """Returns the paths of layers that are modules; experts and routers are adapted if named."""
    return [path for path, size in linears.items() if not isinstance(size, FusedSize)]
