"""What a driver that was killed did not come to say of its trials, the next one says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graft.core.events import EventLog, read_events
from graft.engine.run_folder import CHECKPOINTS, REPORTS_FILE
from graft.runtime.requests import EVENTS_FILE
from graft.runtime.study import Study
from graft.runtime.study_events import say_end, say_report
from tests.unit.runtime.test_study import Grid, opened


def begin(study: Study, *steps: int) -> int:
    """A trial that runs, of which so many reports lie in its folder."""
    asked = study.ask(Grid())
    assert asked is not None
    EventLog(study.folder / EVENTS_FILE).append("start", trial=asked.number, params={})
    folder = study.trial_folder(asked.number)
    for each in steps:
        report: dict[str, Any] = {"steps": each, "seconds": 1.0, "eval/loss": 1 / each}
        EventLog(folder / REPORTS_FILE).append("report", **report)
        study.report(asked.number, each, {"eval/loss": 1 / each})
    return asked.number


def said(study: Study) -> list[tuple[Any, ...]]:
    keys = ("event", "trial", "steps", "state")
    return [tuple(event.get(k) for k in keys) for event in read_events(study.folder / EVENTS_FILE)]


def test_an_unsaid_report_and_end_are_said_once(tmp_path: Path) -> None:
    with opened(tmp_path) as study:
        number = begin(study, 4, 8)
        say_report(EventLog(study.folder / EVENTS_FILE), number, {"steps": 4, "eval/loss": 0.25})
        study.tell(number, "complete")
    for _ in range(2):
        with opened(tmp_path) as study:
            assert said(study) == [
                ("start", 0, None, None),
                ("report", 0, 4, None),
                ("report", 0, 8, None),
                ("end", 0, 8, "complete"),
            ]
    last = read_events(study.folder / EVENTS_FILE)[-2]
    assert last["metrics"] == {"eval/loss": 0.125}


def test_a_running_trial_is_said_as_far_as_it_goes_on(tmp_path: Path) -> None:
    with opened(tmp_path) as study:
        number = begin(study, 4, 8)
        whole = study.trial_folder(number) / CHECKPOINTS / "step-4"
        whole.mkdir(parents=True)
    with opened(tmp_path) as study:
        assert said(study) == [("start", 0, None, None), ("report", 0, 4, None)]


def test_what_was_said_is_left_alone(tmp_path: Path) -> None:
    with opened(tmp_path) as study:
        number = begin(study, 4)
        events = EventLog(study.folder / EVENTS_FILE)
        say_report(events, number, {"steps": 4, "eval/loss": 0.25})
        study.tell(number, "complete")
        say_end(events, study.trial(number))
        events.append("start", trial=7, params={})  # of a database that is another one by now
        before = said(study)
    with opened(tmp_path) as study:
        assert said(study) == before
