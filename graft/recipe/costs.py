"""What a trial costs to keep and to serve: metrics that a search may minimise beside quality."""

from __future__ import annotations

from typing import NamedTuple

from graft.core.registry import nearest

PREFIX = "cost/"
ADAPTER_BYTES = "cost/adapter_bytes"
PEAK_MEMORY_BYTES = "cost/peak_memory_bytes"
LATENCY_MS = "cost/latency_ms"

LATENCY_TOKENS = 32
"""New tokens of a timed answer."""
LATENCY_PROMPTS = 5
"""Held-out prompts that are timed."""


class Cost(NamedTuple):
    """A cost; less of it is better."""

    unit: str
    meaning: str
    is_known_early: bool = True
    """It stands in every report, not in the last one alone."""


COSTS = {
    ADAPTER_BYTES: Cost("bytes", "the tensor file of the adapter, published as it is by then"),
    PEAK_MEMORY_BYTES: Cost(
        "bytes",
        "predicted: the most that one worker takes on its device, training this trial alone",
    ),
    LATENCY_MS: Cost(
        "ms",
        f"measured: an answer of {LATENCY_TOKENS} new tokens alone on the engine, prompt included; "
        f"median of {LATENCY_PROMPTS} held-out prompts",
        is_known_early=False,
    ),
}


def require_cost(metric: str, mode: str) -> None:
    """Refuses a cost that nobody counts, and more of one.

    Raises:
        ValueError: What is wrong and what to write.
    """
    if metric not in COSTS:
        known = ", ".join(COSTS)
        raise ValueError(f"unknown cost {metric!r}.{nearest(metric, list(COSTS))} Known: {known}")
    if mode != "min":
        raise ValueError(
            f"{metric} is a cost, and {mode} would look for the dearest; use mode: min"
        )


def is_known_early(metric: str) -> bool:
    """Tells whether every report has a metric, not the last one alone."""
    return metric not in COSTS or COSTS[metric].is_known_early


def unit_of(metric: str) -> str:
    """Returns a cost's unit; empty for what is no cost."""
    return COSTS[metric].unit if metric in COSTS else ""
