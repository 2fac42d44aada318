"""Where a study is kept: a journal file in its folder, or a database by URL.

A study in a database has `storage.json` in its folder, with its name there: the study's own, and
some digits, so that studies of several homes may share a database. Trials keep their checkpoints
in the folder in either case.
"""

from __future__ import annotations

import json
import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from filelock import FileLock, Timeout

from graft.core.errors import ConfigError
from graft.core.files import require_writable, write_json
from graft.core.model import StrictModel
from graft.core.progress import QUIET, Progress
from graft.runtime.journal import JOURNAL, repair_journal, require_whole
from graft.runtime.postgres import PATIENCE_S, Database, LastingStorage, StudyTakenError

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

    from graft.recipe.search import SearchSection

STORAGE_FILE = "storage.json"
DRIVER = "driver.json"
"""Names the process that drives the study, or drove it last."""

_LOCK_WAIT_S = 1.0
"""Others hold the driver's lock for a moment only: to look for a driver, to do what one asks."""


class Kept(NamedTuple):
    """A study as Optuna finds it."""

    storage: BaseStorage
    name: str


class Place(StrictModel):
    """Where in a database a study is."""

    url: str
    study: str


@contextmanager
def while_running() -> Iterator[None]:
    """Passes over what is written to a trial that somebody has ended meanwhile, in a dashboard."""
    from optuna.exceptions import UpdateFinishedTrialError

    with suppress(UpdateFinishedTrialError):
        yield


def is_begun(folder: Path) -> bool:
    """Tells whether a folder has a study."""
    return (folder / JOURNAL).exists() or (folder / STORAGE_FILE).exists()


def require_storage(section: SearchSection) -> None:
    """Refuses a database that cannot be opened, before any work is done.

    Raises:
        MissingDependencyError: The driver for PostgreSQL is not installed.
        ConfigError: It cannot be reached, or refuses this user.
    """
    if section.storage is not None:
        Database.of(section).require()


@contextmanager
def storage_to_drive(
    folder: Path,
    section: SearchSection,
    *,
    progress: Progress = QUIET,
    patience_s: float = PATIENCE_S,
) -> Iterator[Kept]:
    """Opens a study's storage to write to it; nobody else can meanwhile.

    Args:
        folder: Of the study.
        section: Says where it is kept.
        progress: Told when a database does not answer.
        patience_s: So long it is waited for; then every operation raises a `TrainingError`.

    Raises:
        ConfigError: The folder cannot be written; it cannot be opened; the study was begun
            elsewhere; another driver has it; its journal is damaged before its end.
        TrainingError: A database was waited for in vain.
    """
    require_writable(folder, "the study")
    with _only_driver(folder):
        _require_same_kind(folder, section)
        if section.storage is None:
            repair_journal(folder / JOURNAL)
            yield Kept(_journal(folder), folder.name)
        else:
            with _database_to_drive(folder, Database.of(section), patience_s, progress) as kept:
                yield kept


@contextmanager
def _only_driver(folder: Path) -> Iterator[None]:
    """Holds the lock of the study's folder: its trials' files have one driver, too."""
    lock = _lock(folder)
    try:
        lock.acquire(timeout=_LOCK_WAIT_S)
    except Timeout:
        raise StudyTakenError(
            f"study {folder.name!r} is being run by {_owner(folder)}; wait for it, or give this "
            "recipe another name"
        ) from None
    try:
        write_json(folder / DRIVER, {"host": socket.gethostname(), "pid": os.getpid()})
        yield
    finally:
        lock.release()


def driver_of(folder: Path) -> str | None:
    """Names the process that drives a study from this home; None where none does."""
    lock = _lock(folder)
    if not Path(lock.lock_file).exists():
        return None
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return _owner(folder)
    lock.release()
    return None


def _lock(folder: Path) -> FileLock:
    return FileLock(folder / "driver.lock")


def _owner(folder: Path) -> str:
    try:
        owner = json.loads((folder / DRIVER).read_text())
        return f"process {owner['pid']} on {owner['host']}"
    except (OSError, ValueError, KeyError):
        return "another process"


@contextmanager
def _database_to_drive(
    folder: Path, database: Database, patience_s: float, progress: Progress
) -> Iterator[Kept]:
    database.prepare()
    place = _place(folder, database)
    storage = database.open_to_drive(place.study)
    lasting = LastingStorage(storage, database, patience_s=patience_s, progress=progress)
    try:
        _require_lock(storage)
        yield Kept(cast("BaseStorage", lasting), place.study)
    except Exception:
        if lasting.lost is None:
            raise
        raise lasting.lost from None  # whatever else it led to
    finally:
        storage.engine.dispose()


def storage_to_read(folder: Path, section: SearchSection) -> Kept:
    """Opens a study's storage to look at it.

    Raises:
        ConfigError: There is none, it cannot be opened, or the study was begun elsewhere.
    """
    if not is_begun(folder):
        raise ConfigError(f"there is no study in {folder}; `graft tune` makes one")
    _require_same_kind(folder, section)
    if section.storage is None:
        return Kept(_journal(folder), folder.name)
    database = Database.of(section)
    database.prepare()
    lasting = LastingStorage(database.open(), database, patience_s=0.0, progress=QUIET)
    return Kept(cast("BaseStorage", lasting), _read_place(folder).study)


def _require_same_kind(folder: Path, section: SearchSection) -> None:
    if section.storage is not None and (folder / JOURNAL).exists():
        raise ConfigError(
            f"study {folder.name!r} was begun in {folder / JOURNAL}; take search.storage out, or "
            "give the recipe another name"
        )
    if section.storage is None and (folder / STORAGE_FILE).exists():
        raise ConfigError(
            f"study {folder.name!r} was begun in {_read_place(folder).url}; set search.storage to "
            "it, or give the recipe another name"
        )


def _place(folder: Path, database: Database) -> Place:
    """Finds a study in a database; chooses its name there where it is not begun."""
    known = _read_place(folder) if (folder / STORAGE_FILE).exists() else None
    if known is not None and _has_study(database, known.study):
        return _keep(folder, Place(url=database.url, study=known.study))  # it may have moved
    if known is not None and any((folder / "trials").glob("*")):
        raise ConfigError(
            f"study {folder.name!r} was begun in {known.url} as {known.study!r}, and "
            f"{database.url} has no such study; set search.storage to where it is, restore it "
            "there, or give the recipe another name"
        )
    return _keep(folder, Place(url=database.url, study=f"{folder.name}-{uuid.uuid4().hex[:8]}"))


def _keep(folder: Path, place: Place) -> Place:
    write_json(folder / STORAGE_FILE, place.model_dump(mode="json"))
    return place


def _read_place(folder: Path) -> Place:
    return Place.model_validate_json((folder / STORAGE_FILE).read_bytes())


def _has_study(database: Database, name: str) -> bool:
    try:
        database.open().get_study_id_from_name(name)
    except KeyError:
        return False
    return True


def _require_lock(storage: Any) -> None:
    """Opens the driver's connection, which takes the lock or says who has it."""
    with storage.engine.connect():
        pass


def _journal(folder: Path) -> BaseStorage:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    path = str(folder / JOURNAL)
    try:
        return JournalStorage(JournalFileBackend(path, lock_obj=JournalFileOpenLock(path)))
    except (ValueError, TypeError, KeyError, OSError):
        require_whole(folder / JOURNAL)
        raise
