"""Waiting until a GPU is free: a process that ended may hold its memory a little longer."""

from __future__ import annotations

import logging
import time

import torch

from graft.core.sizes import format_bytes

_FREE_FRACTION = 0.9
"""Of the whole memory; the rest is the driver's and of this process's own context."""
_WAIT_S = 60.0
_STILL_S = 10.0

_log = logging.getLogger(__name__)


def wait_until_free(device: torch.device) -> None:
    """Waits for what an earlier process held; what others go on holding is said in a warning.

    Returns at once on a CPU, whose memory the system shares out.
    """
    if device.type != "cuda":
        return
    started = changed = time.monotonic()
    free, total = torch.cuda.mem_get_info(device)
    while free < _FREE_FRACTION * total and time.monotonic() - started < _WAIT_S:
        time.sleep(0.25)
        before, (free, _) = free, torch.cuda.mem_get_info(device)
        if free > before:
            changed = time.monotonic()
        if time.monotonic() - changed > _STILL_S:
            break
    if free < _FREE_FRACTION * total:
        held = format_bytes(total - free)
        _log.warning("another program holds %s of %s of this GPU", held, format_bytes(total))
