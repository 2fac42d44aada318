"""A study in a PostgreSQL database: one driver at a time, and on through a restart of the server.

The driver has one connection. It takes an advisory lock as it opens, so what is written is written
under that lock, and the lock goes with the connection: none is left behind by a driver that dies,
and a second driver is kept away wherever it runs, even from a copy of the home.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from graft.core.errors import ConfigError, MissingDependencyError, TrainingError
from graft.core.progress import Progress

if TYPE_CHECKING:
    import optuna
    from sqlalchemy import Pool

    from graft.recipe.search import SearchSection

PATIENCE_S = 120.0
"""So long a server is waited for. A trial keeps its seat in a pack for longer than that."""

_BETWEEN_TRIES_S = 1.0
_CONNECT_WITHIN_S = 10
_TAKE_LOCK = "SELECT pg_try_advisory_lock(%s)"
_LOCK_HOLDER = (
    "SELECT application_name FROM pg_locks JOIN pg_stat_activity USING (pid) "
    "WHERE locktype = 'advisory' AND classid::bigint = %s AND objid::bigint = %s AND objsubid = 1"
)
_NOTICE_DEAD_HOSTS = (  # the server's default is two hours, and a dead host's lock lasts as long
    "SET tcp_keepalives_idle = 30; SET tcp_keepalives_interval = 10; SET tcp_keepalives_count = 3"
)


@dataclass(frozen=True)
class Database:
    """A database that keeps studies."""

    url: str
    """Without a password."""
    password: str | None = field(default=None, repr=False)

    @classmethod
    def of(cls, section: SearchSection) -> Database:
        """Reads a recipe's settings and the environment; connects to nothing.

        Raises:
            MissingDependencyError: The driver for PostgreSQL is not installed.
            ConfigError: The password's variable is not set.
        """
        assert section.storage is not None  # else the study is in its folder
        if importlib.util.find_spec("psycopg") is None:
            raise MissingDependencyError(
                "search.storage: a PostgreSQL database needs the package psycopg; pip install "
                "'graft[postgres]'"
            )
        name = section.storage_password_env
        password = os.environ.get(name) if name else None
        if name and not password:
            raise ConfigError(
                f"search.storage: the password is expected in the environment variable {name}, "
                "which is not set"
            )
        return cls(section.storage, password)

    def require(self) -> None:
        """Connects once.

        Raises:
            ConfigError: It cannot be reached, or refuses this user.
        """
        import sqlalchemy

        engine = sqlalchemy.create_engine(
            self._driver_url(), poolclass=sqlalchemy.NullPool, connect_args=self._options()
        )
        try:
            with engine.connect():
                pass
        except sqlalchemy.exc.SQLAlchemyError as error:
            raise ConfigError(
                f"search.storage: cannot open {self.url}: {self.words(error)}; check host, port, "
                "user and database, and that the server runs"
            ) from None

    def prepare(self) -> None:
        """Makes Optuna's tables where there are none.

        Raises:
            ConfigError: The database cannot be opened, or its tables are of another Optuna.
        """
        import sqlalchemy
        from optuna.exceptions import StorageInternalError

        self.require()
        try:
            self.open(is_ready=False)
        except (sqlalchemy.exc.SQLAlchemyError, StorageInternalError) as error:
            raise ConfigError(
                f"search.storage: Optuna's tables cannot be made in {self.url}: "
                f"{self.words(error)}; its user must be allowed to create them"
            ) from None
        except RuntimeError as error:  # Optuna's word for tables of another version
            raise ConfigError(f"search.storage: {self.url}: {error}") from None

    def open(
        self, *, is_ready: bool = True, pool: type[Pool] | None = None, **pool_options: Any
    ) -> optuna.storages.RDBStorage:
        """Opens Optuna's storage; by default each operation has a connection of its own."""
        import sqlalchemy
        from optuna.storages import RDBStorage

        return RDBStorage(
            self._driver_url().replace("{", "{{").replace("}", "}}"),  # Optuna takes a template
            engine_kwargs={
                "poolclass": pool or sqlalchemy.NullPool,
                "connect_args": self._options(),
                **pool_options,
            },
            skip_compatibility_check=is_ready,
            skip_table_creation=is_ready,
        )

    def open_to_drive(self, study: str) -> optuna.storages.RDBStorage:
        """Opens it with one connection, which holds the study's lock from its first moment on.

        Args:
            study: Its name in the database.
        """
        import sqlalchemy

        storage = self.open(
            pool=sqlalchemy.QueuePool, pool_size=1, max_overflow=0, pool_pre_ping=True
        )
        sqlalchemy.event.listen(storage.engine, "connect", partial(_take_lock, study))
        storage.engine.dispose()  # the next connection has the lock, or is none
        return storage

    def words(self, error: BaseException) -> str:
        """Returns the server's first line about an error, without the password."""
        cause = error if hasattr(error, "orig") else error.__cause__ or error
        lines = str(getattr(cause, "orig", cause)).strip().splitlines()
        text = lines[0] if lines else type(cause).__name__
        return text.replace(self.password, "***") if self.password else text

    def _driver_url(self) -> str:
        import sqlalchemy

        url = sqlalchemy.make_url(self.url).set(drivername="postgresql+psycopg")
        return url.render_as_string(hide_password=False)  # there is none in it

    def _options(self) -> dict[str, Any]:
        options = {
            "application_name": f"graft, process {os.getpid()} on {socket.gethostname()}"[:63],
            "connect_timeout": _CONNECT_WITHIN_S,
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": 30_000,
        }
        return options | ({"password": self.password} if self.password else {})


class StudyTakenError(ConfigError):
    """Another driver holds the study's lock."""


def _take_lock(study: str, connection: Any, _: Any) -> None:
    """Takes the lock for a connection that has just been opened."""
    key = int.from_bytes(hashlib.sha256(study.encode()).digest()[:8]) >> 1
    with connection.cursor() as cursor:
        cursor.execute(_NOTICE_DEAD_HOSTS)
        (is_taken,) = cursor.execute(_TAKE_LOCK, (key,)).fetchone()
        holder = cursor.execute(_LOCK_HOLDER, (key >> 32, key & 0xFFFFFFFF)).fetchone()
    connection.commit()
    if not is_taken:
        connection.close()
        raise StudyTakenError(
            f"study {study!r} is being run by {holder[0] if holder else 'another process'}; wait "
            "for it, or give this recipe another name. Of a machine that is gone the database lets "
            "go after a minute"
        )


class LastingStorage:
    """Optuna's storage of a study in a database, for as long as the server comes back in time.

    An operation that fails is done again. That is safe: only one driver writes, and what a repeated
    operation finds done already is left so. A trial whose making was not heard of stays running
    and is taken up with the others that nobody runs.

    Args:
        storage: What Optuna keeps its trials with.
        database: Where.
        patience_s: So long a server is waited for; then every operation raises a `TrainingError`.
        progress: Told that it is waited for.
    """

    def __init__(
        self,
        storage: optuna.storages.RDBStorage,
        database: Database,
        *,
        patience_s: float,
        progress: Progress,
    ) -> None:
        from optuna.storages import get_storage

        self._storage = get_storage(storage)  # in Optuna's cache of ended trials
        self._database = database
        self._patience_s = patience_s
        self._progress = progress
        self.lost: TrainingError | None = None
        """Why the study cannot go on; None where it can."""

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._storage, name)
        return partial(self._do, found) if callable(found) else found

    def _do(self, operation: Callable[..., Any], *args: Any, **fields: Any) -> Any:
        import sqlalchemy
        from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError

        failed_at: float | None = None
        while self.lost is None:
            try:
                result = operation(*args, **fields)
            except UpdateFinishedTrialError:
                if failed_at is None:
                    raise
                result = True
            except (sqlalchemy.exc.SQLAlchemyError, StorageInternalError, StudyTakenError) as error:
                failed_at = self._wait(error, failed_at)
                continue
            if failed_at is not None:
                waited_s = time.monotonic() - failed_at
                self._progress.note(f"the study's database answers again, {waited_s:.0f} s later")
            is_done_already = result is False and failed_at is not None
            return True if is_done_already else result
        raise self.lost

    def _wait(self, error: Exception, failed_at: float | None) -> float:
        """Waits a moment; returns when the operation failed first. Notes when it is over."""
        words = self._database.words(error)
        now = time.monotonic()
        begin = now if failed_at is None else failed_at
        left = begin + self._patience_s - now
        if left <= 0:
            self.lost = TrainingError(
                f"the study's database {self._database.url} fails"
                + (f", for {self._patience_s:.0f} s now" if self._patience_s else "")
                + f": {words}. The trials' checkpoints are kept: the same command goes on once it "
                "is well again"
            )
            return begin
        if failed_at is None:
            self._progress.note(
                f"the study's database fails: {words}; waiting for it for up to "
                f"{self._patience_s:.0f} s"
            )
        time.sleep(min(_BETWEEN_TRIES_S, left))
        return begin
