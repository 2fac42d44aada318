"""The trials of a study in memory, so that what became of one is known without reading them all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from graft.core.pareto import Costs, Front
from graft.runtime.trials import EARLIER, TrialRecord, record_of

if TYPE_CHECKING:
    from graft.runtime.storage import Kept


class TrialRecords:
    """A study's own trials in the order of their numbers, their counts and their front.

    A study is read whole once. Who alone writes to it reads the trials afterwards that it wrote,
    one by one, which costs the same however many there are; who looks on reads again those that
    may have changed. Trials of earlier studies, which only the sampler sees, are passed over.

    Args:
        kept: The study.
        costs: Of a complete trial, smaller being better.
    """

    def __init__(self, kept: Kept, costs: Callable[[TrialRecord], Costs]) -> None:
        self._storage = kept.storage
        self._study_id = kept.storage.get_study_id_from_name(kept.name)
        self._costs = costs
        self._by_number: dict[int, TrialRecord] = {}
        self._num_read = 0
        self._unfinished: set[int] = set()
        self._front: Front[int] = Front()
        self._with_state: set[int] = set()
        self.num_used = 0
        """Trials that use the budget."""
        self.num_ended = 0
        """Trials that were run and need no more work."""
        self.read_all()

    def __getitem__(self, number: int) -> TrialRecord:
        return self._by_number[number]

    def __iter__(self) -> Iterator[TrialRecord]:
        return iter(self._by_number.values())

    def __reversed__(self) -> Iterator[TrialRecord]:
        return reversed(self._by_number.values())

    @property
    def unfinished(self) -> list[TrialRecord]:
        """Those that were begun and need more work."""
        return [self[number] for number in sorted(self._unfinished)]

    @property
    def front(self) -> list[TrialRecord]:
        """The complete ones that no other one beats in every searched metric."""
        return [self[number] for number in sorted(self._front.names)]

    def take_needless(self) -> list[int]:
        """Returns those whose training state nobody goes on from, each once.

        They ended as they should and are not the best; of several that are equally good the first
        one is.
        """
        best: dict[tuple[float, ...], int] = {}
        for trial in self.front:
            best.setdefault(tuple(self._costs(trial)), trial.number)
        kept = {n for n in self._with_state if n in best.values() or self[n].may_go_on}
        needless = sorted(self._with_state - kept)
        self._with_state = kept
        return needless

    def origin(self, number: int) -> int:
        """Returns the trial that one is the further course of, over all its numbers."""
        while (before := self[number].continues) is not None:
            number = before
        return number

    def frozen(self, number: int) -> Any:
        """Reads a trial as Optuna keeps it.

        Raises:
            KeyError: There is none.
        """
        return self._storage.get_trial(
            self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)
        )

    def read(self, number: int) -> None:
        """Reads a trial that was written to, and any that were made before it."""
        for each in (*range(self._num_read, number), number):
            self._take(self.frozen(each))
        self._num_read = max(self._num_read, number + 1)

    def read_new(self) -> int:
        """Reads the trials made since; returns the last one's number."""
        with suppress(KeyError):
            while True:
                self.read(self._num_read)
        return self._num_read - 1

    def read_all(self) -> None:
        """Reads every trial that may have changed since."""
        found = self._storage.get_all_trials(self._study_id, deepcopy=False)
        for frozen in found:
            known = self._by_number.get(frozen.number)
            if known is None or known.state == "waiting" or known.is_unfinished:
                self._take(frozen)
        self._num_read = len(found)

    def _take(self, frozen: Any) -> None:
        if EARLIER in frozen.user_attrs:
            return
        known = self._by_number.get(frozen.number)
        self._put(record_of(frozen, None if known is None else known.continued_by))
        before = self[frozen.number].continues
        if before is not None and self[before].continued_by is None:
            self._put(self[before].model_copy(update={"continued_by": frozen.number}))

    def _put(self, record: TrialRecord) -> None:
        number, known = record.number, self._by_number.get(record.number)
        self._by_number[number] = record
        had_ended = known is not None and known.has_ended
        self.num_ended += record.has_ended - had_ended
        self.num_used += record.uses_budget - (known is not None and known.uses_budget)
        (self._unfinished.add if record.is_unfinished else self._unfinished.discard)(number)
        if record.has_ended and not had_ended:
            self._with_state.add(number)
        elif not record.has_ended:
            self._with_state.discard(number)
        if record.state == "complete" and (known is None or known.state != "complete"):
            self._front.add(number, self._costs(record))
