"""A device is proven free before it is taken, and who holds it is named."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

from graft.core.errors import NoRoomError
from graft.engine.memory.free import Room, room_on, wait_until_free

CPU = torch.device("cpu")


def told(*rooms: tuple[int, int]) -> Callable[[torch.device], Room]:
    """A device that is measured so, one after the other; the last stays."""
    left = [Room(*room) for room in rooms]
    return lambda device: left.pop(0) if len(left) > 1 else left[0]


def test_memory_that_is_given_back_is_waited_for_and_that_is_said_once() -> None:
    said: list[str] = []
    rooms = told((10, 100), (10, 100), (40, 100), (60, 100))
    wait_until_free(CPU, 50, say=said.append, measure=rooms, wait_s=30)
    assert len(said) == 1
    assert "has 10 B of 100 B free where 50 B are needed" in said[0]
    assert "waiting up to 30 s" in said[0]


def test_memory_that_others_go_on_holding_is_refused_with_their_names() -> None:
    with pytest.raises(NoRoomError, match="gave up after") as refused:
        wait_until_free(
            CPU, 50, say=lambda words: None, measure=told((10, 100), (20, 100)), wait_s=0.3
        )
    words = str(refused.value)
    assert "end them, or set scale.device_memory" in words
    assert re.search(r"others have the rest: .+ \(process \d+, [\d.]+ .?B\)", words)


def test_a_device_of_which_nobody_else_has_much_is_free_whatever_is_needed() -> None:
    said: list[str] = []
    wait_until_free(CPU, 2**60, say=said.append, measure=told((95, 100)), wait_s=0)
    assert not said


def test_a_cpu_is_not_looked_at_where_nobody_knows_what_is_needed() -> None:
    def refuses(device: torch.device) -> Room:
        raise AssertionError("measured")

    wait_until_free(CPU, measure=refuses)


def test_a_cpu_has_the_memory_of_its_machine() -> None:
    room = room_on(CPU)
    assert 0 < room.free_bytes < room.total_bytes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_this_process_holds_of_a_gpu_is_not_free() -> None:
    device = torch.device("cuda")
    before = room_on(device)
    held = torch.empty(2**30, dtype=torch.uint8, device=device)
    assert room_on(device).free_bytes <= before.free_bytes - held.numel()
    with pytest.raises(NoRoomError, match=r"others have the rest: "):
        wait_until_free(
            device, before.total_bytes, measure=told((2**30, before.total_bytes)), wait_s=0
        )
