"""The file that every benchmark writes."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from graft.artifacts.record import tool_versions
from graft.core.files import write_json


def write_result(
    path: Path,
    figures: dict[str, float],
    rounds: list[dict[str, Any]],
    threads: int,
    settings: dict[str, object],
) -> None:
    """Writes the figures, what they were taken from, and the machine they were taken on.

    Settings that are paths say nothing of a measurement, and are left out.
    """
    write_json(
        path,
        {
            "figures": figures,
            "rounds": rounds,
            "machine": {
                "cpu": platform.processor() or platform.machine(),
                "cores": os.cpu_count(),
                "threads": threads,
            },
            "versions": tool_versions(),
            "settings": {k: str(v) for k, v in settings.items() if not isinstance(v, Path)},
        },
    )
