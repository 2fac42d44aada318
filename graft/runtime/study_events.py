"""What a study says of its trials in `events.jsonl`, where others follow it.

The study itself is told first. A driver that dies between the two leaves an event out; the next one
says it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from graft.core.events import EventLog
from graft.runtime.requests import EVENTS_FILE
from graft.runtime.trials import TrialRecord, metrics_of

if TYPE_CHECKING:
    from graft.runtime.study import Study


def say_report(events: EventLog, number: int, report: Mapping[str, Any]) -> None:
    """Says what a trial reported."""
    events.append("report", trial=number, steps=report["steps"], metrics=metrics_of(report))


def say_end(events: EventLog, trial: TrialRecord) -> None:
    """Says what became of a trial."""
    number, state = trial.number, trial.state
    events.append("end", trial=number, state=state, steps=trial.steps, reason=trial.reason)


def say_missed(study: Study) -> None:
    """Says what a driver that was killed came to know of its trials and did not come to say."""
    events = EventLog(study.folder / EVENTS_FILE)
    known = {trial.number for trial in study.trials}  # not those that another database has
    unended = {n: steps for n, steps in _unended(events).items() if n in known}
    if not unended:
        return
    from graft.engine.checkpoint import newest_step
    from graft.engine.run_folder import CHECKPOINTS, read_reports

    for number, said in sorted(unended.items()):
        trial, folder = study.trial(number), study.trial_folder(number)
        last = trial.steps if trial.has_ended else newest_step(folder / CHECKPOINTS)
        for report in read_reports(folder):
            if report["steps"] <= last and report["steps"] not in said:
                say_report(events, number, report)
        if trial.has_ended:
            say_end(events, trial)


def _unended(events: EventLog) -> dict[int, set[int]]:
    """Finds the trials that began and whose end was not said: number → reported steps."""
    said: dict[int, set[int]] = {}
    whole: dict[int, set[int]] = {}
    for event in events:
        if event["event"] == "start":
            said[event["trial"]] = whole.setdefault(event["trial"], set())
        elif event["event"] == "report":
            whole.setdefault(event["trial"], set()).add(event["steps"])
        elif event["event"] == "end":
            said.pop(event["trial"], None)
    return said
