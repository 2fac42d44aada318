"""The content-addressed store: `artifacts/<digest>/`, immutable, verified when opened."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from pathlib import Path
from typing import NamedTuple

from graft.artifacts.aliases import NameRegistry
from graft.artifacts.manifest import (
    MANIFEST,
    RECORD,
    Manifest,
    build_manifest,
    list_files,
    read_manifest,
    read_record,
    read_small,
    verify_folder,
)
from graft.artifacts.names import (
    CHAMPION,
    is_folder_reference,
    parse_reference,
    require_digest,
)
from graft.artifacts.record import AdapterRecord
from graft.artifacts.tensors import load_json
from graft.core.errors import AdapterError
from graft.core.files import fsync_folder, require_writable, write_atomic, write_json

STALE_AFTER_S = 24 * 3600.0

Signature = tuple[tuple[str, int, int], ...]


class StoredAdapter(NamedTuple):
    """An adapter folder and what is known of it."""

    path: Path
    record: AdapterRecord
    digest: str | None
    """None for a plain PEFT folder that never went through a store."""


class Store:
    """Adapters and their names in one home. Cheap to make; several processes may use one home."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.names = NameRegistry(home / "names")
        self._folder = home / "artifacts"
        self._verified: dict[str, tuple[Signature, AdapterRecord]] = {}

    def publish(self, folder: Path, record: AdapterRecord) -> str:
        """Copies an adapter folder into the store, returns its digest; the same twice is a no-op.

        Raises:
            AdapterError: NaN, infinity, a damaged or foreign file; nothing is stored then.
            ConfigError: The home cannot be written.
        """
        require_writable(self._folder, "artifacts")
        self.sweep()
        temporary = self._folder / f".publish.tmp-{uuid.uuid4().hex[:8]}"
        temporary.mkdir()
        try:
            for path in list_files(folder):
                if path.name not in (MANIFEST, RECORD):
                    shutil.copyfile(path, temporary / path.name)
            write_json(
                temporary / RECORD, load_json(record.model_dump_json(), where="the adapter record")
            )
            manifest = build_manifest(temporary)
            return self._commit(temporary, manifest)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _commit(self, temporary: Path, manifest: Manifest) -> str:
        digest = manifest.digest
        target = self._folder / digest
        if target.exists():
            self.verify(digest)
            return digest
        for path in list_files(temporary):
            with path.open("rb") as file:
                os.fsync(file.fileno())
        write_atomic(temporary / MANIFEST, manifest.model_dump_json() + "\n")
        try:
            os.rename(temporary, target)
        except OSError:
            if not target.exists():
                raise
        fsync_folder(self._folder)
        return digest

    def open(self, digest: str) -> StoredAdapter:
        """Returns a stored adapter; hashes are checked again when a file's size or time changed.

        Raises:
            AdapterError: Unknown digest, or a file that is not what was published.
        """
        path = self._require(digest)
        signature = _signature(path)
        known = self._verified.get(digest)
        if known is not None and known[0] == signature:
            return StoredAdapter(path, known[1], digest)
        return self.verify(digest)

    def verify(self, digest: str) -> StoredAdapter:
        """Checks every byte of a stored adapter against its digest.

        Raises:
            AdapterError: The message names the file that differs.
        """
        path = self._require(digest)
        signature = _signature(path)
        manifest = read_manifest(path)
        if manifest.digest != digest:
            raise AdapterError(
                f"{path / MANIFEST} does not belong to digest {digest[:12]}; it is damaged or was "
                "edited: restore it from a copy, or publish the adapter anew"
            )
        verify_folder(path, manifest)
        record = read_record(path)
        self._verified[digest] = (signature, record)
        return StoredAdapter(path, record, digest)

    def digests(self) -> list[str]:
        """Digests of all published adapters, sorted."""
        if not self._folder.is_dir():
            return []
        return sorted(path.name for path in self._folder.iterdir() if not path.name.startswith("."))

    def children(self, digest: str, relation: str) -> list[StoredAdapter]:
        """Returns the whole adapters that were made from one; damaged ones are passed over."""
        found: list[StoredAdapter] = []
        for candidate in self.digests():
            try:
                stored = self.open(candidate)
            except AdapterError:
                continue
            if any(p.digest == digest and p.relation == relation for p in stored.record.parents):
                found.append(stored)
        return found

    def resolve_digest(self, reference: str) -> str:
        """Turns `name`, `name@alias`, `name/3`, a digest or its first 8 digits into a digest.

        A bare name means its champion.
        Costs one `stat` for a name, so that a gateway may call it for every request.

        Raises:
            AdapterError: Malformed, unknown or ambiguous.
        """
        parsed = parse_reference(reference)
        if parsed.digest_prefix is not None:
            found = [digest for digest in self.digests() if digest.startswith(parsed.digest_prefix)]
            is_name = parsed.name is not None and parsed.name in self.names.names()
            if len(found) == 1 and not is_name:
                return found[0]
            if len(found) > 1 and not is_name:
                raise AdapterError(f"{reference!r} begins {len(found)} digests; give more digits")
        if parsed.name is None:
            raise AdapterError(f"no artifact {reference[:12]} in {self._folder}")
        state = self.names.state(parsed.name)
        version = (
            parsed.version if parsed.version is not None else state.alias(parsed.alias or CHAMPION)
        )
        return state.digest(version)

    def resolve(self, reference: str, *, allow_folder: bool = False) -> StoredAdapter:
        """Opens what a reference names.

        Args:
            reference: As for `resolve_digest`.
            allow_folder: Also take the path of an adapter folder; for the command line, never for
                a reference that came over the network.

        Raises:
            AdapterError: Unknown, malformed or damaged.
        """
        if allow_folder and is_folder_reference(reference):
            return _open_folder(Path(reference).expanduser())
        return self.open(self.resolve_digest(reference))

    def register(self, name: str, digest: str) -> int:
        """Gives a published adapter the next version number of a name, and returns it."""
        self.open(digest)
        return self.names.register(name, digest)

    def aliases(self, name: str) -> dict[str, int]:
        """Returns alias → version of a name."""
        return dict(self.names.state(name).aliases)

    def promote(self, name: str, version: int, *, expected: int | None = None) -> None:
        """Makes a version the champion after checking that its artifact is whole.

        Args:
            name: A registered name.
            version: The version to promote.
            expected: The champion that the caller saw, 0 for none; None takes whatever is there.

        Raises:
            AdapterError: Unknown, damaged, or somebody else promoted meanwhile.
        """
        self.open(self.names.state(name).digest(version))
        self.names.promote(name, version, expected=expected)

    def rollback(self, name: str) -> int:
        """Makes the previous champion the champion again; returns its version.

        Raises:
            AdapterError: There is no previous champion, or its artifact is gone or damaged.
        """
        state = self.names.state(name)
        if "previous" in state.aliases:
            self.open(state.digest(state.aliases["previous"]))
        return self.names.rollback(name).aliases[CHAMPION]

    def sweep(self, older_than_s: float = STALE_AFTER_S) -> int:
        """Removes what crashed writers left behind; returns how many folders."""
        removed = 0
        for path in self._folder.glob(".*.tmp-*"):
            try:
                if path.stat().st_mtime < time.time() - older_than_s:
                    shutil.rmtree(path, ignore_errors=True)
                    removed += 1
            except FileNotFoundError:
                continue
        return removed

    def _require(self, digest: str) -> Path:
        path = self._folder / require_digest(digest)
        if path.is_symlink() or not path.is_dir():
            raise AdapterError(
                f"no artifact {digest[:12]} in {self._folder}; it was removed or never published"
            )
        return path


def _signature(folder: Path) -> Signature:
    entries = []
    for entry in os.scandir(folder):
        stat = entry.stat(follow_symlinks=False)
        entries.append((entry.name, stat.st_mtime_ns, stat.st_size))
    return tuple(sorted(entries))


def _open_folder(path: Path) -> StoredAdapter:
    """Opens a folder outside the store: a copy of an artifact is verified as one."""
    if (path / MANIFEST).is_file():
        manifest = read_manifest(path)
        verify_folder(path, manifest)
        return StoredAdapter(path, read_record(path), manifest.digest)
    config_path = path / "adapter_config.json"
    if not config_path.is_file():
        raise AdapterError(f"{path} is not an adapter folder: adapter_config.json is missing")
    config = load_json(read_small(config_path), where=str(config_path))
    if not isinstance(config, dict):
        raise AdapterError(f"{config_path} is not a JSON object")
    record = AdapterRecord(
        name=path.name,
        base_source=str(config.get("base_model_name_or_path") or ""),
        base_digest=None,
        method=str(config.get("peft_type") or "").lower(),
        purpose="scores" if config.get("task_type") == "SEQ_CLS" else "answers",
    )
    return StoredAdapter(path, record, None)
