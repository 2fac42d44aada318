"""What a driver that was killed did not come to say of its trials, the next one says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graft.core.events import EventLog, read_events
from graft.engine.run_folder import REPORTS_FILE
from graft.runtime.requests import EVENTS_FILE
from graft.runtime.study import Study
from graft.runtime.study_events import TrialEvents
from graft.runtime.trials import STOPPED_BY_PERSON
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
        EventLog(study.folder / EVENTS_FILE).append("report", trial=number, steps=4, metrics={})
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


def test_a_trial_that_runs_on_is_told_without_a_hole_and_nothing_twice(tmp_path: Path) -> None:
    with opened(tmp_path) as study:
        number = begin(study, 4, 8)
        TrialEvents(study).report(number, {"steps": 4, "eval/loss": 0.25})
    with opened(tmp_path) as study:
        events = TrialEvents(study)
        assert [event[2] for event in said(study)] == [None, 4]
        events.start(number, {})
        for steps in (8, 12, 12):
            events.report(number, {"steps": steps, "eval/loss": 1 / steps})
        assert [event[2] for event in said(study)] == [None, 4, None, 8, 12]


def test_what_was_said_under_an_earlier_number_is_not_said_again(tmp_path: Path) -> None:
    with opened(tmp_path) as study:
        number = begin(study, 4, 8)
        events = TrialEvents(study)
        events.report(number, {"steps": 8, "eval/loss": 0.125})
        study.tell(number, "stopped", reason=STOPPED_BY_PERSON)
        again = study.resume(number)
    with opened(tmp_path) as study:  # no driver came to say that it was stopped
        assert study.unfinished(Grid())
        events = TrialEvents(study)
        events.start(again, {})
        events.report(again, {"steps": 12, "eval/loss": 0.1})
        assert said(study)[1:] == [
            ("report", number, 4, None),
            ("report", number, 8, None),
            ("end", number, 8, "stopped"),
            ("start", again, None, None),
            ("report", again, 12, None),
        ]


def test_what_was_said_is_left_alone(tmp_path: Path) -> None:
    with opened(tmp_path) as study:
        number = begin(study, 4)
        events = TrialEvents(study)
        study.tell(number, "complete")
        events.end(study.trial(number))
        events.start(7, {})  # of a database that is another one by now
        before = said(study)
    with opened(tmp_path) as study:
        assert said(study) == before
