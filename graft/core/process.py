"""Environment variables: those that a process sets at its start, and those of a moment."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_DEVICE_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dri", "/dev/accel")


def prepare_process() -> None:
    """Sets environment variables for this process and those started from it; the user's own stand.

    Idle OpenMP threads sleep instead of spinning: where another process holds a core too, each
    barrier would otherwise wait for the scheduler; decoding on two cores beside one busy neighbour
    took nine times as long. Without an accelerator DeepSpeed is told so, for it would look for one
    and warn; bitsandbytes warns of a 4-bit kernel that only a quantized base would use.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not any(Path(file).exists() for file in _DEVICE_FILES):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Sets variables for as long as the context lasts: some libraries know no other way."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
