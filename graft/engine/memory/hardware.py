"""Accelerators by name: what a recipe is planned for where none of them is at hand."""

from __future__ import annotations

import re

from graft.core.errors import ConfigError
from graft.core.model import StrictModel
from graft.core.registry import nearest


class Gpu(StrictModel):
    """Public facts of one accelerator."""

    name: str
    memory_bytes: int
    """What its driver leaves to programs, as `torch.cuda.get_device_properties` tells it."""
    flops: float
    """Dense half-precision products a second with fp32 sums, in FLOP/s, from its data sheet."""
    bytes_per_s: float
    """Bandwidth of its memory."""
    has_bf16: bool = True
    """Else `flops` is of fp16, and bf16 is slow."""


class Hardware(StrictModel):
    """Some accelerators of one kind."""

    gpu: Gpu
    count: int = 1

    def __str__(self) -> str:
        return self.gpu.name if self.count == 1 else f"{self.count}x {self.gpu.name}"


def _gpu(name: str, gib: float, tflops: float, gb_per_s: float, has_bf16: bool = True) -> Gpu:
    return Gpu(
        name=name,
        memory_bytes=round(gib * 2**30),
        flops=tflops * 1e12,
        bytes_per_s=gb_per_s * 1e9,
        has_bf16=has_bf16,
    )


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        _gpu("T4", 14.6, 65, 320, has_bf16=False),
        _gpu("V100-16GB", 15.8, 125, 900, has_bf16=False),
        _gpu("V100-32GB", 31.7, 125, 900, has_bf16=False),
        _gpu("RTX 3060", 11.6, 25.5, 360),
        _gpu("RTX 3080", 9.6, 59.5, 760),
        _gpu("RTX 3090", 23.6, 71, 936),
        _gpu("RTX 4070 Ti", 11.6, 80.2, 504),
        _gpu("RTX 4080", 15.6, 97.5, 717),
        _gpu("RTX 4090", 23.5, 165.2, 1008),
        _gpu("RTX 5090", 31.3, 209.5, 1792),
        _gpu("RTX A6000", 47.4, 154.8, 768),
        _gpu("RTX 6000 Ada", 47.4, 364.2, 960),
        _gpu("A10", 22.0, 125, 600),
        _gpu("A10G", 22.0, 70, 600),
        _gpu("A30", 23.5, 165, 933),
        _gpu("A40", 44.3, 149.7, 696),
        _gpu("L4", 22.0, 121, 300),
        _gpu("L40S", 44.3, 362, 864),
        _gpu("A100-40GB", 39.4, 312, 1555),
        _gpu("A100-80GB", 79.1, 312, 2039),
        _gpu("H100", 79.1, 989, 3350),
        _gpu("H100 PCIe", 79.1, 756, 2000),
        _gpu("H100 NVL", 93.0, 835, 3900),
        _gpu("H200", 139.7, 989, 4800),
        _gpu("B200", 178.0, 2250, 8000),
    )
}
"""From NVIDIA's data sheets and architecture white papers, without sparsity."""

_COUNTED = re.compile(r"\s*(?:(\d+)\s*[x\u00d7*]\s*)?(.+?)\s*", re.IGNORECASE)
_MAKERS = re.compile(r"\b(nvidia|geforce|tesla)\b", re.IGNORECASE)
_SIZED = re.compile(r"(.+?)[\s_-]+(\d+)\s*gi?b", re.IGNORECASE)
_SAME_SIZE = 0.12
"""A card of 16 GB leaves 14.6 GiB where it checks its memory for errors."""


def parse_hardware(text: str) -> Hardware:
    """Reads `4x A100-40GB`, `RTX 4090`, `H200`.

    Case, spaces, hyphens and a maker's name do not matter.

    Raises:
        ConfigError: It is no known accelerator, or one that comes in several sizes.

    >>> str(parse_hardware("4 x nvidia a100 40gb"))
    '4x A100-40GB'
    """
    match = _COUNTED.fullmatch(text)
    count, name = (match[1], match[2]) if match else (None, text)
    if count is not None and int(count) == 0:
        raise ConfigError(f"{text!r} asks for no GPU at all; give at least 1, as in 4x A100-40GB")
    return Hardware(gpu=_known(name), count=int(count or 1))


def _known(name: str) -> Gpu:
    by_short = {_short(known): gpu for known, gpu in GPUS.items()}
    if found := by_short.get(_short(name)):
        return found
    sized = _SIZED.fullmatch(name)
    found = by_short.get(_short(sized[1])) if sized else None
    if sized and found and abs(found.memory_bytes / 2**30 / int(sized[2]) - 1) < _SAME_SIZE:
        return found
    sizes = [
        gpu.name for short, gpu in by_short.items() if re.fullmatch(_short(name) + r"\d\dgb", short)
    ]
    if sizes:
        raise ConfigError(f"{name!r} comes in several sizes; say which: {' or '.join(sizes)}")
    near = nearest(_MAKERS.sub("", name).strip().upper(), list(GPUS))
    raise ConfigError(f"unknown GPU {name!r}.{near} Known: {', '.join(sorted(GPUS))}")


def _short(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", _MAKERS.sub("", name.lower()))
