"""What memory a machine has, told without loading torch."""

from __future__ import annotations

import subprocess
from pathlib import Path

_CGROUP_FILES = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_CGROUP_USED = ("/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory/memory.usage_in_bytes")


def host_memory_bytes() -> int:
    """Returns the memory that programs here may have: the machine's, or the container's limit."""
    import psutil

    total = int(psutil.virtual_memory().total)
    limits = [text for file in _CGROUP_FILES if (text := _read(Path(file))).isdigit()]
    return min([total, *map(int, limits)])


def free_host_bytes() -> int:
    """Returns the memory that programs here may still take: the machine's, or the container's."""
    import psutil

    found = [int(psutil.virtual_memory().available)]
    for files in zip(_CGROUP_FILES, _CGROUP_USED, strict=True):
        limit, used = (_read(Path(file)) for file in files)
        if limit.isdigit() and used.isdigit():
            cached = _cached_bytes(Path(files[0]).with_name("memory.stat"))
            found.append(int(limit) - int(used) + cached)
    return max(0, min(found))


def gpu_memory_bytes() -> int:
    """Returns the memory of the smallest NVIDIA GPU; 0 without one."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return 0
    sizes = [int(line) << 20 for line in told.stdout.split("\n") if line.strip().isdigit()]
    return min(sizes, default=0)


def _cached_bytes(stat: Path) -> int:
    """Of files that a container has read and gives back when memory is asked for."""
    fields = dict(line.split() for line in _read(stat).splitlines())
    return int(fields.get("total_inactive_file", fields.get("inactive_file", 0)))


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
