"""Mends what a crash leaves of an Optuna journal file, and says where one is damaged."""

from __future__ import annotations

import json
import os
from pathlib import Path

from graft.core.errors import ConfigError

JOURNAL = "study.journal"


def repair_journal(path: Path) -> None:
    """Drops a torn last line and a lock file that nobody holds. Call it under the driver's lock.

    Raises:
        ConfigError: It cannot be read, or a line before the last one is damaged.
    """
    for left in path.parent.glob(f"{path.name}.lock*"):
        left.unlink(missing_ok=True)
    if not path.exists():
        return
    lines = _lines(path)
    damaged = _damaged(lines)
    if damaged is None:
        return
    if damaged < len(lines):
        raise _words(path, damaged)
    with path.open("r+b") as file:
        file.truncate(sum(map(len, lines[:-1])))
        file.flush()
        os.fsync(file.fileno())


def require_whole(path: Path) -> None:
    """Refuses a journal that Optuna could not read, which passes over a torn last line.

    Raises:
        ConfigError: It cannot be read, or a line of it is damaged.
    """
    damaged = _damaged(_lines(path))
    if damaged is not None:
        raise _words(path, damaged)


def _lines(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise ConfigError(
            f"{path}, which is the study, cannot be read: {error.strerror}; restore it from a "
            "copy, or give the recipe another name to begin a new study"
        ) from None


def _damaged(lines: list[bytes]) -> int | None:
    """Returns the number of the first damaged line, from 1; None where all are whole."""
    return next((at for at, line in enumerate(lines, 1) if not _is_whole(line)), None)


def _words(path: Path, line: int) -> ConfigError:
    return ConfigError(
        f"{path} is damaged at line {line}; restore the file from a copy, or give the recipe "
        "another name to begin a new study"
    )


def _is_whole(line: bytes) -> bool:
    try:
        operation = json.loads(line)
    except ValueError:
        return False
    return line.endswith(b"\n") and isinstance(operation, dict) and "op_code" in operation
