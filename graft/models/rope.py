"""Rotary embeddings that depend on the longest row of a pass, and not on each row alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_OF_THE_PASS = frozenset({"dynamic", "longrope"})


def reads_rows_alone(config: PreTrainedConfig) -> bool:
    """Tells whether the angles of a row's positions never depend on the rows beside it."""
    return not any(of.get("rope_type") in _OF_THE_PASS for of in _parameters(config))


def short_context(config: PreTrainedConfig) -> int | None:
    """Longest row, in positions, that LongRoPE (arXiv 2402.13753) reads with its short factors.

    A pass takes the long ones for all of its rows where one of them is longer, and so do the passes
    over a row's later tokens, whose earlier ones are cached with the short factors by then.

    Returns:
        None where the base has one set of factors.
    """
    found = [
        int(of["original_max_position_embeddings"])
        for of in _parameters(config)
        if of.get("rope_type") == "longrope"
    ]
    return min(found, default=None)


def _parameters(config: PreTrainedConfig) -> Iterator[Mapping[str, Any]]:
    """Of the whole base, or of each kind of its layers."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return (of for of in (rope, *rope.values()) if isinstance(of, Mapping))
