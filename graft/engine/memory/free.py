"""Proof that a device has room before it is taken: who had it may hold memory a while longer."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from graft.core.errors import NoRoomError
from graft.core.machine import (
    free_host_memory_bytes,
    gpu_holders,
    host_holders,
    host_memory_bytes,
)
from graft.core.sizes import format_bytes

_FREE_FRACTION = 0.9
"""Of the whole memory; the rest is the driver's and of this process's own context."""
_WAIT_S = 60.0
_STILL_S = 10.0
_LOOK_EVERY_S = 0.25

_log = logging.getLogger(__name__)


class Room(NamedTuple):
    """Memory of a device."""

    free_bytes: int
    total_bytes: int

    def is_enough(self, needed_bytes: int) -> bool:
        """Tells whether so much is free, or all that ever is; 0 is not known, and takes all."""
        is_all = self.free_bytes >= _FREE_FRACTION * self.total_bytes
        return is_all or 0 < needed_bytes <= self.free_bytes


def room_on(device: torch.device) -> Room:
    """Measures a device; of a CPU the memory of its machine, or of the container's limit."""
    if device.type == "cuda":
        return Room(*torch.cuda.mem_get_info(device))
    return Room(free_host_memory_bytes(), host_memory_bytes())


def wait_until_free(
    device: torch.device,
    needed_bytes: int = 0,
    *,
    say: Callable[[str], object] = _log.warning,
    measure: Callable[[torch.device], Room] = room_on,
    wait_s: float = _WAIT_S,
) -> None:
    """Waits for what an earlier process held.

    Args:
        device: That this process is about to fill.
        needed_bytes: That it takes beside what it has; 0 where that is not known: then a GPU is to
            be free as a whole and is taken with a warning where others go on holding a part of it,
            and a CPU, whose memory the system shares out, is not looked at.
        say: Told once what is waited for.
        measure: Tells the memory of the device.
        wait_s: At most so long.

    Raises:
        NoRoomError: Others go on holding what is needed; with their names.
    """
    if device.type == "cpu" and not needed_bytes:
        return
    started = changed = time.monotonic()
    room, has_said = measure(device), not needed_bytes
    while not room.is_enough(needed_bytes):
        now = time.monotonic()
        if now - started >= wait_s or (not needed_bytes and now - changed > _STILL_S):
            _give_up(device, room, needed_bytes, now - started)
            return
        if not has_said:
            say(f"{_in_words(device, room, needed_bytes)}; waiting up to {wait_s:.0f} s")
            has_said = True
        time.sleep(_LOOK_EVERY_S)
        before, room = room, measure(device)
        if room.free_bytes > before.free_bytes:
            changed = now


def _give_up(device: torch.device, room: Room, needed_bytes: int, waited_s: float) -> None:
    if not needed_bytes:
        held = format_bytes(room.total_bytes - room.free_bytes)
        total = format_bytes(room.total_bytes)
        _log.warning("another program holds %s of %s of this GPU", held, total)
        return
    raise NoRoomError(
        f"{_in_words(device, room, needed_bytes)}; gave up after {waited_s:.0f} s: end them, or "
        "set scale.device_memory so that nothing larger is tried; what was trained is kept, and "
        "the same command goes on from there"
    )


def _in_words(device: torch.device, room: Room, needed_bytes: int) -> str:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, holders = properties.name, gpu_holders(str(properties.uuid))
    else:
        name, holders = "the memory", host_holders()
    told = ", ".join(holders) or "processes that cannot be seen from here"
    return (
        f"{name} of node {platform.node()} has {format_bytes(room.free_bytes)} of "
        f"{format_bytes(room.total_bytes)} free where {format_bytes(needed_bytes)} are needed; "
        f"others have the rest: {told}"
    )
