"""Peak memory of this process and all its children, sampled every few seconds."""

from __future__ import annotations

import threading
from types import TracebackType

import psutil


class MemoryMeter:
    """Samples the summed PSS, in which memory that processes share counts once.

    A sample walks the page tables of every process, so a shorter interval slows what it measures.
    """

    def __init__(self, every_s: float = 4.0) -> None:
        self.peak_bytes = 0
        self._every_s = every_s
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
        while not self._ended.wait(self._every_s):
            total = 0
            for process in [own, *own.children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except (psutil.Error, OSError):
                    continue
            self.peak_bytes = max(self.peak_bytes, total)
