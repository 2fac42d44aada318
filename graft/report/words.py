"""Figures and names as a person reads them, HTML not included."""

from __future__ import annotations

from collections.abc import Iterable

from graft.artifacts.record import MetricValue
from graft.report.svg import number


def short_name(param: str) -> str:
    """`method[lora]/r` → `lora r`; `train.lr` → `lr`."""
    branch, _, field = param.rpartition("/")
    kind = branch.rpartition("[")[2].rstrip("]") if "[" in branch else ""
    return f"{kind} {field.rpartition('.')[2]}".strip()


def interval_words(value: MetricValue) -> str:
    """`[0.92, 0.98] on 240 rows`."""
    rows = f"{value.rows:,} rows"
    if value.low is None or value.high is None:
        return f"({rows})"
    return f"[{number(value.low)}, {number(value.high)}] on {rows}"


def bytes_words(num: int) -> str:
    """`1.3 MB`, decimal units."""
    size = float(num)
    for unit in ("B", "kB", "MB"):
        if size < 999.5:  # else three digits of it are 1e+03
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


def bytes_scale(values: Iterable[float]) -> tuple[float, str]:
    """The decimal unit that sizes are drawn in, by the largest: (bytes, name)."""
    largest = max(values, default=0.0)
    units = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
    return next((unit for unit in units if largest >= unit[0]), (1.0, "bytes"))


def metric_words(value: float, unit: str) -> str:
    """A measured value with its unit: `1.3 MB`, `12.5 ms`."""
    if unit == "bytes":
        return bytes_words(round(value))
    return f"{number(value)} {unit}".strip()


def duration_words(seconds: float) -> str:
    """`4 min 10 s`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {left} s"
