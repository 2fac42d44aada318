"""What a study may spend over all its drivers: trials, hours and tokens."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from graft.core.model import StrictModel

if TYPE_CHECKING:
    from graft.recipe.search import SearchSection
    from graft.runtime.study import Study

_KEEP_EVERY_S = 5.0
"""Hours are kept with a report, at most this often; a driver that is killed loses those since."""


class Spending(StrictModel):
    """A study's budgets and what is spent of them; None is no budget."""

    trials: int
    num_ended: int
    max_hours: float | None
    hours: float
    """Wall time of searching."""
    max_tokens: int | None
    tokens: int
    """Trained on by all trials together."""

    @property
    def num_left(self) -> int:
        """Trials that have not ended, begun or not."""
        return max(0, self.trials - self.num_ended)

    @property
    def words(self) -> str:
        """What is spent, of how much where that is bounded."""
        hours = f"{self.hours:.3g}" + _of(self.max_hours, "g")
        tokens = f"{self.tokens:,}" + _of(self.max_tokens, ",")
        return f"{self.num_ended} of {self.trials} trials, {hours} hours, {tokens} tokens"

    @property
    def left(self) -> str:
        """What is left of every budget that there is."""
        left = [f"{self.num_left} trials"]
        if self.max_hours is not None:
            left.append(f"{max(0.0, self.max_hours - self.hours):.3g} hours")
        if self.max_tokens is not None:
            left.append(f"{max(0, self.max_tokens - self.tokens):,} tokens")
        return ", ".join(left)


class Budget:
    """Counts what a driver spends of its study's hours and tokens; it begins with itself.

    Args:
        study: Knows what earlier drivers have spent.
    """

    def __init__(self, study: Study) -> None:
        self._study = study
        self._of_trial = {t.number: t.tokens for t in study.trials if t.continued_by is None}
        self._tokens = sum(self._of_trial.values())
        self._earlier_s = study.seconds
        self._began_s = self._kept_s = time.monotonic()

    def count(self, number: int, tokens: int) -> None:
        """Takes in how many tokens a trial has come to; keeps the hours now and then."""
        self._tokens += tokens - self._of_trial.get(number, 0)
        self._of_trial[number] = tokens
        if time.monotonic() - self._kept_s > _KEEP_EVERY_S:
            self.keep()

    def move(self, ended: int, again: int) -> None:
        """Takes in that an ended trial goes on under another number, with the tokens it has."""
        self._of_trial[again] = self._of_trial.pop(ended, 0)

    def keep(self) -> None:
        """Keeps the hours in the study."""
        self._kept_s = time.monotonic()
        self._study.keep_seconds(self._earlier_s + self._kept_s - self._began_s)

    @property
    def spending(self) -> Spending:
        """What is spent by now."""
        section = self._study.section
        return Spending(
            trials=section.trials,
            num_ended=self._study.records.num_ended,
            max_hours=section.max_hours,
            hours=self._hours,
            max_tokens=section.max_tokens,
            tokens=self._tokens,
        )

    @property
    def spent(self) -> str | None:
        """The budget that forbids to go on, `search.max_tokens`; None where none does."""
        section = self._study.section
        if section.max_tokens is not None and self._tokens >= section.max_tokens:
            return "search.max_tokens"
        if section.max_hours is not None and self._hours >= section.max_hours:
            return "search.max_hours"
        return None

    def pause(self, number: int) -> None:
        """Keeps that a running trial waits for a larger budget."""
        reason = f"{self.spent} is spent; a larger one goes on from the checkpoint"
        self._study.note(number, paused=reason)

    def pause_rest(self) -> None:
        """Does so with all that still run once a budget is spent."""
        if self.spent is not None:
            for trial in self._study.records.unfinished:
                if trial.state == "running":
                    self.pause(trial.number)

    @property
    def ended_by(self) -> str:
        """What ended a search that is over, as a path of the recipe."""
        if not self._study.has_work:
            return "search.trials"
        return self.spent or "search.sampler"  # a grid whose points have all been tried

    @property
    def _hours(self) -> float:
        return (self._earlier_s + time.monotonic() - self._began_s) / 3600


def read_spending(folder: Path, section: SearchSection) -> Spending:
    """Returns what a study has spent, begun or not, while another process may drive it."""
    from graft.runtime.storage import is_begun
    from graft.runtime.study import read_study

    if is_begun(folder):
        return Budget(read_study(folder, section)).spending
    return Spending(
        trials=section.trials,
        num_ended=0,
        max_hours=section.max_hours,
        hours=0.0,
        max_tokens=section.max_tokens,
        tokens=0,
    )


def _of(most: float | None, form: str) -> str:
    return "" if most is None else f" of {most:{form}}"
