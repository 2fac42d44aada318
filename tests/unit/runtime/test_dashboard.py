"""`optuna-dashboard` reads a study as it is, in a journal and in a database."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from graft.runtime.journal import JOURNAL
from graft.runtime.study import open_study
from tests.postgres import missing, running_server
from tests.unit.runtime.test_storage import section
from tests.unit.runtime.test_study import FACTS, Conditional, run_trial

LOSSES = {0: 0.5, 1: 0.25, 2: 0.75}


@contextmanager
def dashboard(storage: str) -> Iterator[httpx.Client]:
    """Runs it on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "optuna_dashboard._cli", storage]
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port), "--quiet"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}/api", timeout=30) as client:
            deadline = time.monotonic() + 60
            while True:
                try:
                    client.get("/meta").raise_for_status()
                    break
                except httpx.TransportError:
                    assert process.poll() is None
                    assert time.monotonic() < deadline
            yield client
    finally:
        process.kill()
        process.wait()


def require_shown(client: httpx.Client, name: str) -> None:
    """Compares what it shows with what was told."""
    (summary,) = client.get("/studies").raise_for_status().json()["study_summaries"]
    assert summary["study_name"].startswith(name)
    reply = client.get(f"/studies/{summary['study_id']}", params={"after": 0})
    detail: dict[str, Any] = reply.raise_for_status().json()
    trials = {trial["number"]: trial for trial in detail["trials"]}
    assert {number: t["state"] for number, t in trials.items()} == {
        0: "Complete",
        1: "Complete",
        2: "Complete",
        3: "Pruned",
        4: "Running",
    }
    assert {n: t["values"] for n, t in trials.items() if n in LOSSES} == {
        number: [loss] for number, loss in LOSSES.items()
    }
    assert trials[1]["intermediate_values"] == [{"step": 10, "value": 0.25}]
    assert {"method", "train/lr"} <= {p["name"] for p in trials[1]["params"]}


def write_study(folder: Path, storage: str | None) -> None:
    own = section() if storage is None else section(storage=storage)
    with open_study(folder, own, FACTS) as study:
        for loss in LOSSES.values():
            run_trial(study, Conditional(), loss)
        run_trial(study, Conditional(), 0.9, "stopped")
        study.ask(Conditional())


def test_a_journal_opens_in_the_dashboard_and_stays_as_it_is(tmp_path: Path) -> None:
    write_study(tmp_path / "home", None)
    journal = tmp_path / "home" / JOURNAL
    content = journal.read_bytes()
    with dashboard(str(journal)) as client:
        require_shown(client, "home")
    assert journal.read_bytes() == content
    with open_study(tmp_path / "home", section(), FACTS) as study:
        assert len(study.unfinished(Conditional())) == 1


@pytest.mark.slow
@pytest.mark.skipif(bool(missing()), reason=missing() or "a server is here")
def test_a_database_opens_in_the_dashboard(tmp_path: Path) -> None:
    with running_server() as server:
        write_study(tmp_path / "home", server.socket_url)
        url = server.socket_url.replace("postgresql://", "postgresql+psycopg://")
        with dashboard(url) as client:
            require_shown(client, "home-")
