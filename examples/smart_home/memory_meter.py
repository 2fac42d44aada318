"""Peak memory of this process and all its children, sampled every few seconds."""

from __future__ import annotations

import threading
import time
from types import TracebackType

import psutil

_SHORTEST_PAUSE_S = 2.0
_PAUSE_PER_COST = 10.0


class MemoryMeter:
    """Samples the summed PSS, in which memory that processes share counts once.

    A sample walks the page tables of every process and so slows what it measures: the pause until
    the next one grows with what it cost.
    """

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemoryMeter:
        self._thread.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        own = psutil.Process()
        pause_s = _SHORTEST_PAUSE_S
        while not self._ended.wait(pause_s):
            total, started = 0, time.monotonic()
            for process in [own, *own.children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except (psutil.Error, OSError):
                    continue
            self.peak_bytes = max(self.peak_bytes, total)
            pause_s = max(_SHORTEST_PAUSE_S, _PAUSE_PER_COST * (time.monotonic() - started))
