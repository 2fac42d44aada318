"""What the trials of a sweep are given, whoever runs them; imports nothing that takes time."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Trial:
    """One LoRA configuration."""

    r: int
    lora_alpha: float
    lr: float
    start: str
    """Folder of the adapter that it starts from, in PEFT's format."""


@dataclass(frozen=True)
class Task:
    """A sweep: every trial learns the same rows in the same order."""

    model: str
    """Folder in the Hugging Face layout."""
    dtype: str
    """Of the base, as torch names it."""
    rows: list[list[int]]
    """Tokens, in the order of the steps; all of one length, every token but the first a target."""
    held_out: list[list[int]]
    """What each trial is measured on at its reports."""
    batch_size: int
    steps: int
    report_every: int
    threads: int
    """Of all processes together."""
    trials: list[Trial]

    def save(self, path: Path) -> None:
        """Writes the task for another process."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")


def read_task(path: Path) -> Task:
    """Reads what `save` wrote."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return Task(**{**content, "trials": [Trial(**trial) for trial in content["trials"]]})
