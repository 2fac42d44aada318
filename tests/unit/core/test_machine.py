"""What a machine tells of its memory."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from graft.core.machine import (
    Cgroup,
    free_host_memory_bytes,
    gpu_holders,
    host_holders,
    host_memory_bytes,
)

HOLD = (
    "import time; held = bytearray(b'x' * 200_000_000); print('held', flush=True); time.sleep(60)"
)


def test_free_memory_is_a_part_of_all_memory() -> None:
    assert 0 < free_host_memory_bytes() < host_memory_bytes()


def test_a_container_has_what_its_limit_leaves_and_files_that_can_be_dropped(
    tmp_path: Path,
) -> None:
    group = Cgroup(tmp_path, "memory.max", "memory.current", "inactive_file")
    assert group.free_bytes is None
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    assert group.free_bytes == 300
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 150\n")
    assert group.free_bytes == 450
    (tmp_path / "memory.max").write_text("max\n")
    assert group.limit_bytes is None
    assert group.free_bytes is None


def test_a_process_that_holds_memory_is_named_with_what_it_holds() -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        told = host_holders(count=10_000)
    finally:
        holder.kill()
        holder.communicate()
    (words,) = [words for words in told if f"(process {holder.pid}," in words]
    match = re.search(r", (\d+) MB\)$", words)
    assert match is not None
    assert int(match[1]) >= 200


def test_a_gpu_that_is_not_there_is_held_by_nobody() -> None:
    assert gpu_holders("GPU-00000000-0000-0000-0000-000000000000") == []
