"""Files that are either whole or absent: temporary name, fsync, rename; digests."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from graft.core.errors import ConfigError


def sha256_file(path: Path) -> str:
    """Returns the SHA-256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Returns the SHA-256 of a value's canonical JSON (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def fsync_folder(path: Path) -> None:
    """Makes renames and new names inside a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_disk_full(error: BaseException) -> bool:
    """Tells whether a file could not be written for want of room; safetensors says so in words."""
    full = (errno.ENOSPC, errno.EDQUOT)
    code = getattr(error, "errno", None)
    return code in full or any(f"(os error {number})" in str(error) for number in full)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a file so that readers see the old content or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    data = content.encode() if isinstance(content, str) else content
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Writes readable JSON atomically."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def folder_atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary sibling folder that becomes `path` on success and vanishes on failure.

    Raises:
        FileExistsError: `path` already exists.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
        fsync_folder(temporary)
        if path.exists():
            raise FileExistsError(f"{path} already exists")
        os.rename(temporary, path)
        fsync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Removes a folder so that a crash leaves it whole or gone, never in part under its name."""
    hidden = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    with suppress(FileNotFoundError):
        os.rename(path, hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Removes what crashes left of folders and files in the making. For the folder's one writer."""
    for left in folder.glob(".*.tmp-*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def require_writable(
    path: Path, purpose: str, *, option: str = "--home (or GRAFT_HOME)", keep: bool = True
) -> None:
    """Fails early and in words where a folder cannot be made or written.

    Args:
        path: The folder; made where it is absent.
        purpose: What is to be written, as the message says it.
        option: With what another folder is chosen.
        keep: False leaves no folder behind that was not there: more is to be checked.

    Raises:
        ConfigError: The folder cannot be created, or nothing can be written into it.
    """
    absent = [folder for folder in (path, *path.parents) if not os.path.lexists(folder)]
    probe = path / f".write-probe-{uuid.uuid4().hex[:8]}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"cannot write {purpose} to {path}: {error.strerror or error}; choose another folder "
            f"with {option} that this user may write"
        ) from error
    with suppress(OSError):  # another process may have put something there meanwhile
        for folder in () if keep else absent:
            folder.rmdir()
