"""Mends what a crash leaves of an Optuna journal file."""

from __future__ import annotations

import json
import os
from pathlib import Path

from graft.core.errors import ConfigError

JOURNAL = "study.journal"


def repair_journal(path: Path) -> None:
    """Drops a torn last line and a lock file that nobody holds. Call it under the driver's lock.

    Raises:
        ConfigError: A line before the last one is damaged.
    """
    for left in path.parent.glob(f"{path.name}.lock*"):
        left.unlink(missing_ok=True)
    if not path.exists():
        return
    data = path.read_bytes()
    lines = data.splitlines(keepends=True)
    whole = [_is_whole(line) for line in lines]
    if all(whole):
        return
    if not all(whole[:-1]):
        raise ConfigError(
            f"{path} is damaged at line {whole.index(False) + 1}; restore the file from a copy, or "
            "give the recipe another name to begin a new study"
        )
    with path.open("r+b") as file:
        file.truncate(len(data) - len(lines[-1]))
        file.flush()
        os.fsync(file.fileno())


def _is_whole(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return line.endswith(b"\n")
