"""What memory a machine has, what is free and who has the rest, told without loading torch."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import NamedTuple

from graft.core.sizes import format_bytes


class Cgroup(NamedTuple):
    """Where the limit of a container is written."""

    folder: Path
    limit: str
    used: str
    droppable: str
    """Of what is used: pages of files that the system takes back when it needs them."""

    @property
    def limit_bytes(self) -> int | None:
        """The limit; None where there is none."""
        text = _read(self.folder / self.limit)
        return int(text) if text.isdigit() else None

    @property
    def free_bytes(self) -> int | None:
        """What the limit leaves; None where there is none."""
        limit, used = self.limit_bytes, _read(self.folder / self.used)
        if limit is None or not used.isdigit():
            return None
        lines = _read(self.folder / "memory.stat").splitlines()
        facts = dict(line.split(maxsplit=1) for line in lines)
        return limit - int(used) + int(facts.get(self.droppable, "0"))


_CGROUPS = (
    Cgroup(Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    Cgroup(
        Path("/sys/fs/cgroup/memory"),
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)
"""Of versions 2 and 1."""


def host_memory_bytes() -> int:
    """Returns the memory that programs here may have: the machine's, or the container's limit."""
    import psutil

    total = int(psutil.virtual_memory().total)
    limits = [group.limit_bytes for group in _CGROUPS]
    return min([total, *(limit for limit in limits if limit is not None)])


def free_host_memory_bytes() -> int:
    """Returns what of that no program has; files that are kept in memory count as free."""
    import psutil

    free = int(psutil.virtual_memory().available)
    left = [group.free_bytes for group in _CGROUPS]
    return max(0, min([free, *(size for size in left if size is not None)]))


def gpu_memory_bytes() -> int:
    """Returns the memory of the smallest NVIDIA GPU; 0 without one."""
    sizes = [int(line) << 20 for line in _ask_gpus("--query-gpu=memory.total") if line.isdigit()]
    return min(sizes, default=0)


def host_holders(count: int = 3) -> list[str]:
    """Names the processes that have most of the host's memory, this one left out.

    Each as `python (process 4711, 3.1 GB)`.
    """
    import psutil

    found = []
    for process in psutil.process_iter(["name", "memory_info"]):
        memory = process.info["memory_info"]
        if process.pid != os.getpid() and memory is not None:
            found.append((int(memory.rss), process.pid, str(process.info["name"])))
    largest = sorted(found, reverse=True)[:count]
    return [f"{name} (process {pid}, {format_bytes(size)})" for size, pid, name in largest]


def gpu_holders(uuid: str) -> list[str]:
    """Names the processes that have memory of one GPU, as its driver tells them; as above.

    Those of other containers have no name here.
    """
    found = []
    for line in _ask_gpus("--query-compute-apps=gpu_uuid,pid,used_memory"):
        gpu, pid, used = (part.strip() for part in line.split(","))
        if gpu.removeprefix("GPU-") == uuid.removeprefix("GPU-") and int(pid) != os.getpid():
            size = f", {format_bytes(int(used) << 20)}" if used.isdigit() else ""
            found.append(f"{_process_name(int(pid))} (process {pid}{size})")
    return found


def _process_name(pid: int) -> str:
    import psutil

    try:
        return str(psutil.Process(pid).name())
    except psutil.Error:
        return "a program"


def _ask_gpus(query: str) -> list[str]:
    """Lines that NVIDIA's tool answers; none where there is no GPU."""
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in told.stdout.splitlines() if line.strip()]


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
