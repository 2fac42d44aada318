"""Journals: whole lines, whatever ended the process or the disk in between."""

from __future__ import annotations

from pathlib import Path

from graft.core.events import EventLog, read_events


def test_a_line_that_a_full_disk_cut_is_dropped_by_the_same_writer(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "log.jsonl")
    log.append("first", text="a\u2028b")
    with log.path.open("a") as file:
        file.write('{"event": "torn')
    with log.path.open("ab") as file:
        file.write("é".encode()[:1])
    assert [event["event"] for event in log] == ["first"]
    log.append("second")
    assert [event["event"] for event in read_events(log.path)] == ["first", "second"]


def test_a_journal_that_is_one_torn_line_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"event"')
    log = EventLog(path)
    assert path.read_bytes() == b""
    log.append("first")
    assert [event["event"] for event in log] == ["first"]
