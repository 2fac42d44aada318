"""A study in PostgreSQL: the same study, one driver, no password, on through a dead server."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from graft.core.errors import ConfigError, MissingDependencyError, TrainingError
from graft.core.progress import Progress
from graft.recipe.search import SearchSection
from graft.runtime.journal import JOURNAL
from graft.runtime.postgres import Database
from graft.runtime.storage import STORAGE_FILE, require_storage
from graft.runtime.study import Study, open_study, read_study
from tests.postgres import PASSWORD, Server, missing, running_server
from tests.unit.runtime.test_study import FACTS, Conditional, run_trial

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "a server is here")

VARIABLE = "GRAFT_TEST_STUDY_PASSWORD"
LOSSES = [0.9, 0.4, 0.7, 0.2, 0.6, 0.3, 0.8, 0.5, 0.45, 0.35]


class Notes(Progress):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.text = ""

    def note(self, text: str) -> None:
        """Keeps a line."""
        self.text += f"{text}\n"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server() as running:
        yield running


def section(**fields: Any) -> SearchSection:
    return SearchSection.model_validate({"trials": 20, **fields})


def opened(folder: Path, url: str | None, **options: Any) -> AbstractContextManager[Study]:
    fields = {} if url is None else {"storage": url}
    return open_study(folder / "study", section(**fields), FACTS, **options)


def test_a_study_in_a_database_is_the_one_that_a_journal_would_hold(
    tmp_path: Path, server: Server
) -> None:
    found = []
    for url in (None, server.socket_url):
        folder = tmp_path / str(url is None)
        for half in (LOSSES[:6], LOSSES[6:]):
            with opened(folder, url) as study:
                for loss in half:
                    run_trial(study, Conditional(), loss)
                run_trial(study, Conditional(), 0.1, "stopped")
        own = section() if url is None else section(storage=url)
        study = read_study(folder / "study", own)
        found.append([t.model_dump() for t in study.trials])
        assert study.best().metrics["eval/loss"] == 0.2
    assert found[0] == found[1]
    assert len(found[0]) == len(LOSSES) + 2


def test_a_trial_left_running_comes_back_from_the_database(tmp_path: Path, server: Server) -> None:
    with opened(tmp_path, server.socket_url) as study:
        study.enqueue([{"method": "wide", "method[wide]/r": 33}])
        asked = study.ask(Conditional())
        assert asked is not None
        study.report(asked.number, 10, {"eval/loss": 0.4})
    with opened(tmp_path, server.socket_url) as study:
        assert study.unfinished(Conditional()) == [asked]


def test_homes_that_share_a_database_have_studies_of_their_own(
    tmp_path: Path, server: Server
) -> None:
    for name in ("one", "two"):
        with opened(tmp_path / name, server.socket_url) as study:
            assert run_trial(study, Conditional(), 0.5) == 0


def test_the_password_is_kept_nowhere(
    tmp_path: Path,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv(VARIABLE, PASSWORD)
    own = section(storage=server.url, storage_password_env=VARIABLE)
    require_storage(own)
    with open_study(tmp_path / "study", own, FACTS) as study:
        run_trial(study, Conditional(), 0.5)
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert any(server.url.encode() in content for content in files)
    everywhere = [*map(repr, files), caplog.text, *capfd.readouterr(), repr(Database.of(own))]
    assert not [text for text in everywhere if PASSWORD in text]


@pytest.mark.parametrize(
    ("url", "password", "words"),
    [
        ("{url}", "not-the-password", "password authentication failed for user"),
        ("{url}_absent", PASSWORD, 'database "postgres_absent" does not exist'),
        ("postgresql://bob@127.0.0.1:{port}/postgres", PASSWORD, "authentication failed"),
        ("postgresql://ann@127.0.0.1:1/postgres", PASSWORD, "refused"),
        ("postgresql://ann@host.invalid/postgres", PASSWORD, "host.invalid"),
    ],
)
def test_a_database_that_cannot_be_opened_is_refused_without_the_password(
    tmp_path: Path,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    url: str,
    password: str,
    words: str,
) -> None:
    monkeypatch.setenv(VARIABLE, password)
    url = url.format(url=server.url, port=server.port)
    own = section(storage=url, storage_password_env=VARIABLE)
    with pytest.raises(ConfigError, match=r"search\.storage: cannot open postgresql://") as caught:
        require_storage(own)
    assert words in str(caught.value)
    assert password not in "".join(traceback.format_exception(caught.value))
    with (
        pytest.raises(ConfigError, match=r"search\.storage"),
        open_study(tmp_path / "s", own, FACTS),
    ):
        pass
    assert not (tmp_path / "s" / STORAGE_FILE).exists()  # nothing was begun under that URL


def test_a_password_that_is_not_set_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    own = section(storage="postgresql://db/x", storage_password_env=VARIABLE)
    with pytest.raises(ConfigError, match=f"environment variable {VARIABLE}, which is not set"):
        require_storage(own)


def test_without_the_driver_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'graft\[postgres\]'"):
        require_storage(section(storage="postgresql://db/x"))


def hold(folder: Path, url: str, ready: Any) -> None:
    with opened(folder, url):
        ready.set()
        signal.pause()


def test_a_second_driver_is_refused_even_in_a_copy_of_the_home(
    tmp_path: Path, server: Server
) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    other = context.Process(target=hold, args=(tmp_path / "home", server.socket_url, ready))
    other.start()
    try:
        assert ready.wait(60)
        with (
            pytest.raises(ConfigError, match=f"process {other.pid} on"),
            opened(tmp_path / "home", server.socket_url),
        ):
            pass
        shutil.copytree(tmp_path / "home", tmp_path / "copy")
        (tmp_path / "copy" / "study" / "driver.json").unlink()  # only the database knows
        with (
            pytest.raises(ConfigError, match=f"is being run by graft, process {other.pid} on "),
            opened(tmp_path / "copy", server.socket_url),
        ):
            pass
    finally:
        assert other.pid is not None
        os.kill(other.pid, signal.SIGKILL)
        other.join()
    deadline = time.monotonic() + 120
    while True:  # the server notices a moment later
        try:
            with opened(tmp_path / "copy", server.socket_url) as study:
                assert run_trial(study, Conditional(), 0.5) == 0
            return
        except ConfigError:
            assert time.monotonic() < deadline


def restarted(server: Server) -> threading.Thread:
    """Kills the server, and starts it again beside what comes next."""
    server.kill()
    thread = threading.Thread(target=server.start)
    thread.start()
    return thread


def test_a_server_that_comes_back_in_time_is_waited_for(tmp_path: Path, server: Server) -> None:
    notes = Notes()
    with opened(tmp_path, server.socket_url, progress=notes, patience_s=60) as study:
        told = {run_trial(study, Conditional(), LOSSES[0]): LOSSES[0]}
        for loss in LOSSES[1:4]:
            asked = study.ask(Conditional())
            assert asked is not None
            thread = restarted(server)
            study.report(asked.number, 10, {"eval/loss": loss})
            study.tell(asked.number, "complete")
            thread.join()
            told[asked.number] = loss
        thread = restarted(server)
        told[run_trial(study, Conditional(), LOSSES[4])] = LOSSES[4]
        thread.join()
    assert "waiting for it for up to 60 s" in notes.text
    assert "answers again" in notes.text
    with opened(tmp_path, server.socket_url) as study:
        complete = [t for t in study.trials if t.state == "complete"]
        assert {t.number: t.metrics["eval/loss"] for t in complete} == told
        assert [t.state for t in study.trials] == ["complete"] * 5


def drive_until_the_server_dies(folder: Path, server: Server) -> None:
    """Leaves a trial running; wraps what goes wrong as Tune does, and tells it ended after that."""
    with opened(folder, server.socket_url, patience_s=1) as study:
        run_trial(study, Conditional(), 0.5)
        asked = study.ask(Conditional())
        assert asked is not None
        server.kill()
        try:
            study.report(asked.number, 10, {"eval/loss": 0.4})
        except TrainingError as error:
            with pytest.raises(TrainingError):  # it does not wait again
                study.tell(asked.number, "failed")
            raise RuntimeError("of a callback") from error


def test_a_server_that_stays_away_ends_the_search_and_the_study_goes_on_later(
    tmp_path: Path, server: Server
) -> None:
    with pytest.raises(TrainingError, match=r"for 1 s now: .*the same command goes on") as lost:
        drive_until_the_server_dies(tmp_path, server)
    assert lost.value.__cause__ is None
    with pytest.raises(ConfigError, match="cannot open"):
        read_study(tmp_path / "study", section(storage=server.socket_url))
    server.start()
    with opened(tmp_path, server.socket_url) as study:
        (asked,) = study.unfinished(Conditional())
        assert asked.number == 1
        study.report(asked.number, 10, {"eval/loss": 0.4})
        study.tell(asked.number, "complete")
        assert [t.state for t in study.trials] == ["complete", "complete"]


def drive_until_another_takes_over(folder: Path, server: Server) -> None:
    """Loses the connection, as where a network is away, and writes once more."""
    holders = "SELECT pid FROM pg_locks WHERE locktype = 'advisory'"
    with opened(folder / "home", server.socket_url, patience_s=0.5) as study:
        run_trial(study, Conditional(), 0.5)
        server.sql(f"SELECT pg_terminate_backend(pid) FROM ({holders}) AS holder")
        shutil.copytree(folder / "home", folder / "copy")
        deadline = time.monotonic() + 120
        while server.sql(holders):
            assert time.monotonic() < deadline
        with opened(folder / "copy", server.socket_url) as second:
            run_trial(second, Conditional(), 0.4)
            run_trial(study, Conditional(), 0.3)


def test_a_driver_that_lost_its_lock_writes_no_more(tmp_path: Path, server: Server) -> None:
    with pytest.raises(TrainingError, match="is being run by"):
        drive_until_another_takes_over(tmp_path, server)
    with opened(tmp_path / "copy", server.socket_url) as study:
        assert [t.metrics["eval/loss"] for t in study.trials] == [0.5, 0.4]


def test_a_study_stays_where_it_was_begun(tmp_path: Path, server: Server) -> None:
    with opened(tmp_path / "file", None) as study:
        run_trial(study, Conditional(), 0.5)
    with (
        pytest.raises(ConfigError, match=f"begun in .*{JOURNAL}; take search.storage out"),
        opened(tmp_path / "file", server.socket_url),
    ):
        pass
    with opened(tmp_path / "database", server.socket_url) as study:
        run_trial(study, Conditional(), 0.5)
        study.trial_folder(0).mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"set search\.storage to it"):
        read_study(tmp_path / "database" / "study", section())
    server.sql("CREATE DATABASE elsewhere")
    elsewhere = server.socket_url.replace("/postgres?", "/elsewhere?")
    with (
        pytest.raises(ConfigError, match=r"elsewhere.* has no such study; set search\.storage"),
        opened(tmp_path / "database", elsewhere),
    ):
        pass
