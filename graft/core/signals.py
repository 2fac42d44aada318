"""SIGTERM as a question, so that work ends where it can be continued."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def told_to_end() -> Iterator[Callable[[], bool]]:
    """Yields what answers whether SIGTERM has come; while the context lasts it ends nothing.

    Only a process's main thread hears signals: elsewhere the answer stays no.
    """
    has_come = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield has_come.is_set
        return
    before = signal.signal(signal.SIGTERM, lambda *_: has_come.set())
    try:
        yield has_come.is_set
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
