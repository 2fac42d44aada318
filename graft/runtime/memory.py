"""What a worker says when it runs out of memory, so that its driver can learn from it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from graft.core.errors import DeviceMemoryError
from graft.core.sizes import format_bytes
from graft.runtime.trials import fail_trial

KILLED = "low on memory"
"""In Ray's words of a process that its memory monitor has killed."""


@contextmanager
def told_of_memory(folder: Path) -> Iterator[None]:
    """Leaves a measurement in the run's folder where what happens inside runs out of memory.

    Raises:
        DeviceMemoryError: It did.
    """
    from graft.engine.memory.exhausted import exhausted_bytes

    try:
        yield
    except Exception as error:
        needed = exhausted_bytes(error)
        if needed is None:
            raise
        fail_trial(folder, "out of memory", needed_bytes=needed)
        raise DeviceMemoryError(
            f"out of memory: a worker asked for at least {format_bytes(needed)}; `graft plan` "
            "names the nearest combination that fits"
        ) from error
