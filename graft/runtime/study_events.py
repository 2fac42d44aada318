"""What a study says of its trials in `events.jsonl`, where others follow it.

A trial's folder and the study know first. What a driver or a pack that died came to know and did
not come to say is said by the next one, and nothing twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from graft.core.events import EventLog
from graft.runtime.requests import EVENTS_FILE
from graft.runtime.trials import TrialRecord, metrics_of

if TYPE_CHECKING:
    from graft.runtime.study import Study


class TrialEvents:
    """The starts, reports and ends of a study's trials.

    Args:
        study: Opened to be driven.
    """

    def __init__(self, study: Study) -> None:
        self._study = study
        self._log = EventLog(study.folder / EVENTS_FILE)
        self._steps: dict[int, set[int]] = {}
        """Trial → steps of the reports that were said of it."""
        self._unended: set[int] = set()
        for event in self._log:
            if event["event"] == "start":
                self._unended.add(event["trial"])
            elif event["event"] == "report":
                self._steps.setdefault(event["trial"], set()).add(event["steps"])
            elif event["event"] == "end":
                self._unended.discard(event["trial"])

    def say(self, event: str, **fields: Any) -> None:
        """Appends one event."""
        self._log.append(event, **fields)

    def start(self, number: int, params: Mapping[str, Any]) -> None:
        """Says that a trial begins, or goes on."""
        self._unended.add(number)
        self.say("start", trial=number, params=dict(params))

    def report(self, number: int, report: Mapping[str, Any]) -> None:
        """Says a trial's report, after those before it that nobody said."""
        self._catch_up(number, int(report["steps"]) - 1)
        self._report(number, report)

    def end(self, trial: TrialRecord) -> None:
        """Says what became of a trial, after the reports that nobody said."""
        self._catch_up(trial.number, trial.steps)
        self._unended.discard(trial.number)
        number, state = trial.number, trial.state
        self.say("end", trial=number, state=state, steps=trial.steps, reason=trial.reason)

    def say_missed(self) -> None:
        """Says what the driver before this one did not come to say."""
        for trial in self._study.trials:  # others that were said are in another database
            if trial.number in self._unended and not trial.is_unfinished:
                self.end(trial)

    def _catch_up(self, number: int, last: int) -> None:
        from graft.engine.run_folder import read_reports

        for report in read_reports(self._study.trial_folder(number)):
            if report["steps"] <= last:
                self._report(number, report)

    def _report(self, number: int, report: Mapping[str, Any]) -> None:
        steps = int(report["steps"])
        if steps not in self._said(number):
            self._steps[number].add(steps)
            self.say("report", trial=number, steps=steps, metrics=metrics_of(report))

    def _said(self, number: int) -> set[int]:
        """Steps that were said, under this number or that of a trial which it goes on from."""
        said = self._steps.setdefault(number, set())
        before = self._study.trial(number).continues
        return said if before is None else said | self._said(before)
