"""Eight-bit storage: each block of values becomes signed bytes and one scale.

Blocks run along the longer side of a tensor, so that a low-rank factor's few directions keep scales
of their own. A scale is a bfloat16 number: its product with a signed byte is exact in fp32, so that
the served values are the verified ones, bit by bit, and encoding twice changes nothing. Use it
last.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from graft.compressors.base import COMPRESSORS, Adapter, Compressor
from graft.core.errors import CompressionError

if TYPE_CHECKING:
    import torch

_SCALE = ".scale"
_LEVELS = 127
_SMALLEST = 1e-30
"""Blocks below this are stored as zeros: their scale would not be a normal number."""


@COMPRESSORS.register
class Int8Compressor(Compressor):
    """Symmetric absolute-maximum quantization by blocks.

    Reference:
        8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861.
    """

    type: Literal["int8"] = "int8"
    block: int = Field(64, ge=8)
    """Values that share one scale."""

    def compress(self, adapter: Adapter) -> Adapter:
        """Returns the adapter with every value rounded to what the format holds, in fp32.

        Raises:
            CompressionError: A tensor holds NaN or infinity.
        """
        tensors = {
            site: {key: self._rounded(f"{site}.{key}", value) for key, value in of_site.items()}
            for site, of_site in adapter.tensors.items()
        }
        return Adapter(adapter.method, tensors, storage=self)

    def _rounded(self, name: str, value: torch.Tensor) -> torch.Tensor:
        if not _is_quantized(value):
            return value
        if not value.isfinite().all():
            raise CompressionError(f"compress int8: {name} holds NaN or infinity")
        return _dequantize(*_quantize(value, self.block), self.block)

    def encode(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Each tensor as int8 of the same shape, beside it `<name>.scale` in bfloat16."""
        encoded: dict[str, torch.Tensor] = {}
        for name, value in state.items():
            if not _is_quantized(value):
                encoded[name] = value
                continue
            encoded[name], encoded[name + _SCALE] = _quantize(value, self.block)
        return encoded

    def decode(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The fp32 values that were encoded.

        Raises:
            CompressionError: A scale is missing, or its shape does not fit.
        """
        import torch

        decoded: dict[str, torch.Tensor] = {}
        for name, value in state.items():
            scale = state.get(name + _SCALE)
            if scale is not None and value.dtype == torch.int8:
                wanted = (*_blocked_shape(value, self.block),)[:-1]
                if tuple(scale.shape) != wanted:
                    raise CompressionError(
                        f"{name}{_SCALE} has shape {tuple(scale.shape)}, expected {wanted} for "
                        f"blocks of {self.block}; the file is damaged"
                    )
                decoded[name] = _dequantize(value, scale, self.block)
            elif value.dtype == torch.int8:
                raise CompressionError(f"{name}{_SCALE} is missing; the file is damaged")
            elif not name.endswith(_SCALE):
                decoded[name] = value
        return decoded


def _is_quantized(value: torch.Tensor) -> bool:
    """Integers are kept, and so is the nothing of a layer that has no rank left."""
    return value.is_floating_point() and value.numel() > 0


def _is_tall(value: torch.Tensor) -> bool:
    return value.ndim == 2 and value.shape[0] > value.shape[1]


def _blocked_shape(value: torch.Tensor, block: int) -> tuple[int, int, int]:
    """Rows, blocks a row, values a block, once the longer side is last."""
    length = max(value.shape) if value.ndim == 2 else value.shape[-1]
    return value.numel() // length, -(-length // block), block


def _blocked(value: torch.Tensor, block: int) -> torch.Tensor:
    from torch.nn.functional import pad

    rows, num_blocks, _ = _blocked_shape(value, block)
    wide = (value.T if _is_tall(value) else value).reshape(rows, -1)
    return pad(wide, (0, num_blocks * block - wide.shape[1])).view(rows, num_blocks, block)


def _unblocked(blocked: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    wide = blocked.flatten(1)[:, : like.numel() // blocked.shape[0]]
    if _is_tall(like):
        return wide.T.contiguous()
    return wide.reshape(like.shape).contiguous()


def _quantize(value: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns int8 of the same shape, and bfloat16 scales `[rows, blocks]`."""
    import torch

    blocked = _blocked(value.float(), block)
    largest = blocked.abs().amax(-1)
    largest = torch.where(largest < _SMALLEST, torch.zeros_like(largest), largest)
    scale = (largest / _LEVELS).bfloat16()
    divisor = torch.where(scale > 0, scale.float(), torch.ones_like(largest))
    levels = (blocked / divisor[..., None]).round().clamp(-_LEVELS, _LEVELS)
    levels = levels * (scale > 0)[..., None]
    return _unblocked(levels.to(torch.int8), value), scale


def _dequantize(levels: torch.Tensor, scale: torch.Tensor, block: int) -> torch.Tensor:
    return _unblocked(_blocked(levels.float(), block) * scale.float()[..., None], levels)
