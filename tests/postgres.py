"""A PostgreSQL server for tests: started in a folder of its own, killed and started again."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PASSWORD = "s3cret-of-the-studies"
USER = "ann"


def missing() -> str:
    """Says why no server can be started here; nothing where one can."""
    absent = [name for name in ("initdb", "pg_ctl", "postgres") if _program(name) is None]
    return f"PostgreSQL's {', '.join(absent)} not found" if absent else ""


class Server:
    """One server; it asks for a password over TCP, and for none on its Unix socket."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]

    @property
    def url(self) -> str:
        """Of its database over TCP, without the password."""
        return f"postgresql://{USER}@127.0.0.1:{self.port}/postgres"

    @property
    def socket_url(self) -> str:
        """Of the same database on the Unix socket."""
        return f"postgresql://{USER}@/postgres?host={self.folder}&port={self.port}"

    def make(self) -> None:
        """Makes the database's files."""
        password = self.folder / "password"
        password.write_text(PASSWORD)
        _give_away(password)
        self._run(
            "initdb",
            *("--pgdata", self._data, "--username", USER, "--pwfile", str(password)),
            *("--auth-host=scram-sha-256", "--auth-local=trust", "--no-sync", "--encoding=UTF8"),
        )

    def start(self) -> None:
        """Starts it and waits until it answers."""
        options = f"-k {self.folder} -p {self.port} -c listen_addresses=127.0.0.1 -c fsync=off"
        log = str(self.folder / "log")
        self._run("pg_ctl", "-D", self._data, "-l", log, "-o", options, "-w", "start")

    def kill(self) -> None:
        """Ends it as a crash does: no connection is closed in words, nothing is flushed."""
        self._run("pg_ctl", "-D", self._data, "-m", "immediate", "stop")

    def sql(self, text: str) -> list[Any]:
        """Runs one statement."""
        import psycopg

        options = {"host": str(self.folder), "port": self.port, "user": USER, "dbname": "postgres"}
        with psycopg.connect(**options, autocommit=True) as connection:  # type: ignore[arg-type]
            cursor = connection.execute(text)
            return cursor.fetchall() if cursor.description else []

    @property
    def _data(self) -> str:
        return str(self.folder / "data")

    def _run(self, name: str, *arguments: str) -> None:
        program = _program(name)
        assert program is not None  # `missing` was asked
        subprocess.run(
            [program, *arguments],
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            cwd=self.folder,
            **_as_owner(),
        )


@contextmanager
def running_server() -> Iterator[Server]:
    """Runs a server in a short path, as a Unix socket's must be, that its user may enter."""
    folder = Path(tempfile.mkdtemp(prefix="graft-pg-"))
    _give_away(folder)
    server = Server(folder)
    try:
        server.make()
        server.start()
        yield server
        if (folder / "data" / "postmaster.pid").exists():
            server.kill()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _program(name: str) -> str | None:
    debian = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return shutil.which(name) or (str(debian[-1]) if debian else None)


def _as_owner() -> dict[str, Any]:
    """Who runs it: the server refuses root."""
    if os.getuid() != 0:
        return {}
    user = pwd.getpwnam("nobody")
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def _give_away(path: Path) -> None:
    if owner := _as_owner():
        os.chown(path, owner["user"], owner["group"])
