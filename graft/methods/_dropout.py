"""Dropout masks from a counter instead of a generator's state.

Shapes: N rows, T tokens, F features.
"""

from __future__ import annotations

import torch

from graft.core.seeds import derive_seed
from graft.methods.routing import DropoutStream

_LOW_31_BITS = 0x7FFFFFFF


def _as_int32(value: int) -> int:
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >= 1 << 31 else value


_MULTIPLIERS = (_as_int32(0x85EBCA6B), _as_int32(0xC2B2AE35))


def _mix(hashed: torch.Tensor) -> torch.Tensor:
    """MurmurHash3's 32-bit finalizer (public domain constants), in place; shifts are logical."""
    for shift, multiplier in ((16, _MULTIPLIERS[0]), (13, _MULTIPLIERS[1])):
        hashed ^= (hashed >> shift) & ((1 << (32 - shift)) - 1)
        hashed *= multiplier
    hashed ^= (hashed >> 16) & 0xFFFF
    return hashed


def keep_scale(
    stream: DropoutStream,
    site_index: int,
    shape: tuple[int, int, int],
    p: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Returns 0 where a feature is dropped and `1 / (1 - p)` where it is kept.

    The result is `[rows, tokens, features]`. Token positions count from a row's first token, so
    right padding changes no mask.
    """
    _, tokens, features = shape
    device = stream.rows.device
    key = derive_seed("dropout", stream.seed, stream.step, site_index)
    row_N = _mix(stream.rows.to(torch.int32) * 0x01000193 + _as_int32(key))
    column_NT = torch.arange(tokens, device=device) if stream.columns is None else stream.columns
    token_NT = column_NT.to(torch.int32) * 0x27D4EB2F
    hashed_NT = _mix((row_N[:, None] ^ _as_int32(key >> 32)) + token_NT)
    feature_F = torch.arange(features, dtype=torch.int32, device=device) * _as_int32(0x9E3779B1)
    hashed_NTF = _mix(hashed_NT[:, :, None] + feature_F)
    hashed_NTF &= _LOW_31_BITS
    kept_NTF = hashed_NTF >= int(p * (1 << 31))
    return kept_NTF.to(dtype).mul_(1.0 / (1.0 - p))
