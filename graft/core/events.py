"""Append-only JSON lines: the journal of a run, torn last lines tolerated on reading."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class EventLog:
    """A journal file. Each event is one JSON object with `event` and `time_s` (Unix seconds).

    One process writes; any number read. A line cut by a crash is dropped by the next writer.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._repair()

    def _repair(self) -> None:
        if not self.path.exists() or not self.path.stat().st_size:
            return
        with self.path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)

    def append(self, event: str, **fields: Any) -> dict[str, Any]:
        """Writes one event durably and returns it."""
        record = {"event": event, "time_s": time.time(), **fields}
        line = json.dumps(record, ensure_ascii=False)
        self._repair()  # of an append that a full disk cut
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        return record

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(read_events(self.path))


def read_events(path: Path) -> list[dict[str, Any]]:
    """Reads all whole events of a journal; an absent file is an empty journal."""
    if not path.exists():
        return []
    with path.open("rb") as file:  # a torn line may end within a character
        return [json.loads(line) for line in file if line.endswith(b"\n")]
