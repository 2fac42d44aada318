"""The folder on a fast disk that ZeRO-Infinity (arXiv 2104.07857) swaps to.

It is checked before workers start. Every process swaps in a folder of its own below it, which goes
with the process; what a killed one left is removed by the next.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft.core.errors import ConfigError
from graft.core.files import require_writable
from graft.core.sizes import format_bytes

if TYPE_CHECKING:
    import torch

_FIELD = "scale.offload.nvme_path"
_MOUNTS = Path("/proc/self/mounts")
_OVER_A_NETWORK = frozenset(
    {"9p", "afs", "beegfs", "ceph", "cifs", "fuse.gcsfuse", "fuse.glusterfs", "fuse.s3fs"}
    | {"fuse.sshfs", "glusterfs", "gpfs", "lustre", "nfs", "nfs4", "smb3", "smbfs", "wekafs"}
)
_PREFIX = "graft-swap-"
_LOCK = "lock"


def require_nvme(path: Path, needed_bytes: int, *, mounts: Path = _MOUNTS) -> None:
    """Refuses a folder that cannot be swapped to; what killed processes left there is removed.

    Args:
        path: Of `scale.offload.nvme_path`, on this node.
        needed_bytes: What all workers of this node will write there.
        mounts: The table of mounted disks; one that is not there is not asked.

    Raises:
        ConfigError: It is absent, not writable, over a network, or has too little room.
    """
    if not path.is_dir():
        raise ConfigError(
            f"{_FIELD}: there is no folder {path}; make it, on a disk of this node, or use cpu"
        )
    kind = filesystem_type(path, mounts)
    if kind in _OVER_A_NETWORK:
        raise ConfigError(
            f"{_FIELD}: {path} is on a network disk ({kind}), which a step would wait for; name a "
            "folder on a disk of the node itself, or use cpu"
        )
    require_writable(path, "what is swapped out", option=_FIELD)
    _remove_left(path)
    free = shutil.disk_usage(path).free
    if free < needed_bytes:
        raise ConfigError(
            f"{_FIELD}: {path} has {format_bytes(free)} free and up to "
            f"{format_bytes(needed_bytes)} will be written there; make room, or use cpu"
        )


def filesystem_type(path: Path, mounts: Path = _MOUNTS) -> str | None:
    """Returns the type of the file system that a folder is on; None where no table tells."""
    if not mounts.is_file():
        return None
    place, found, longest = path.resolve(), None, -1
    for line in mounts.read_text().splitlines():
        _, mounted_at, kind = line.split()[:3]
        at = Path(mounted_at.encode().decode("unicode_escape"))
        if place.is_relative_to(at) and len(at.parts) >= longest:
            found, longest = kind, len(at.parts)
    return found


def swap_folder(path: Path, owner: object) -> Path:
    """Makes a folder for this process; it is removed when the owner or the process ends.

    Two runs may share a disk: DeepSpeed's own names would have them write over each other.
    """
    _remove_left(path)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=path))
    lock = os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    weakref.finalize(owner, _give_back, folder, lock)
    return folder


def keep_told_dtype() -> None:
    """Has DeepSpeed swap weights in the dtype that it was told.

    Its own reading of that argument takes bf16 instead wherever a CPU has no products in fp16, and
    weights would come back from the disk as other numbers than they went.
    """
    from deepspeed.runtime.zero.partition_parameters import Init

    reads = Init._set_dtype
    if getattr(reads, "keeps_told_dtype", False):
        return

    def set_dtype(init: Any, ds_config: Any, dtype: torch.dtype | None) -> None:
        reads(init, ds_config, dtype)
        if dtype is not None:
            init.dtype = dtype

    set_dtype.keeps_told_dtype = True  # type: ignore[attr-defined]
    Init._set_dtype = set_dtype


def _give_back(folder: Path, lock: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)


def _remove_left(path: Path) -> None:
    for lock in path.glob(f"{_PREFIX}*/{_LOCK}"):
        _remove_if_left(lock)


def _remove_if_left(lock: Path) -> None:
    """Removes the folder of a process that is gone: nobody holds its lock."""
    try:
        opened = os.open(lock, os.O_RDWR)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(lock.parent, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(opened)
