"""Sizes of memory as people write and read them."""

from __future__ import annotations

import re

_UNITS = {
    "": 1,
    "b": 1,
    "bytes": 1,
    **{f"{p}b": 1000**n for n, p in enumerate("kmgt", 1)},
    **{f"{p}ib": 1024**n for n, p in enumerate("kmgt", 1)},
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """Reads `40GB` (decimal), `24GiB` (binary) or a plain number of bytes.

    Raises:
        ValueError: It is no size, or no positive one.

    >>> parse_bytes("1.5GiB")
    1610612736
    """
    match = _SIZE.fullmatch(text)
    unit = _UNITS.get(match[2].lower()) if match else None
    size = round(float(match[1]) * unit) if match and unit else 0
    if size < 1:
        raise ValueError(f"{text!r} is no size of memory; write it as 40GB, 24GiB or 512MB")
    return size


def format_bytes(size: float) -> str:
    """Formats bytes as `1.2 GB`, decimal, with two or three digits that count.

    >>> format_bytes(1234567890), format_bytes(45_000_000), format_bytes(800)
    ('1.23 GB', '45 MB', '800 B')
    """
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(size) >= factor:
            value = size / factor
            return f"{value:.2f} {unit}" if value < 10 else f"{value:.0f} {unit}"
    return f"{size:.0f} B"
