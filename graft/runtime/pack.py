"""A pack: one base in memory, a slot for each of several trials, one thread that steps them all.

The pack knows nothing of Ray; `graft.runtime.packed` runs it as an actor. Other threads only leave
requests and wait; the loop's own thread touches the model. After a report a trial stands still
until its next report is asked for, so a trial that is stopped there has cost nothing more.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from graft.core.errors import GraftError, NoRoomError, TrainingError
from graft.engine.costs import costs_of
from graft.engine.memory.exhausted import exhausted_bytes
from graft.engine.multi import MultiAdapterModel
from graft.engine.run import (
    LoadedRun,
    join_run,
    measure,
    report_on,
    require_finite,
    run_facts,
)
from graft.engine.run_folder import (
    RECIPE_FILE,
    Report,
    drop_reports_after,
    read_progress,
    save_progress,
)
from graft.engine.train import SlotState, StepReport, Trainer
from graft.recipe.sections import Recipe
from graft.runtime.trials import Loss, fail_trial

if TYPE_CHECKING:
    from graft.data.template import ChatTemplate
    from graft.engine.reward_models import RewardModels

_log = logging.getLogger(__name__)

_MOMENT_S = 2.0
"""At most, for trials that stand at a report or take the place of one that has ended."""
_LOOK_EVERY_S = 0.05


@dataclass
class _Seat:
    """One trial in the pack."""

    number: int
    folder: Path
    run: LoadedRun
    """Of its own recipe, on the base that all share."""
    facts: dict[str, Any]
    need: float | None
    """Bytes that it was predicted to take alone; None is not known."""
    state: Literal["waiting", "training", "done", "failed"] = "waiting"
    leaves: bool = False
    reported: int = 0
    """Step of the last report."""
    asked_after: int = 0
    """The trial has seen the report of this step and wants the next one; it wants the first."""
    report: Report | None = None
    failure: str | None = None
    renewed_s: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    """Of training, all attempts together."""
    tokens: float = 0
    """Trained on, all attempts together."""
    window: list[StepReport] = field(default_factory=list)
    """Step reports since the last report."""

    @property
    def is_ready(self) -> bool:
        """It may do its next step."""
        return self.state == "training" and self.asked_after >= self.reported


class Pack:
    """Trains the trials that joined it, each as if alone.

    Args:
        model: The base.
        run_of: Makes a trial's run of its recipe, on this base.
        home: For `train.init_from`.
        slots: Trials in training at once; others wait for a seat.
        template: Of the base; needed where an objective samples answers.
        judges: Reward models that objectives ask.
        lease_s: A trial that has not asked for this long has lost its runner and is removed.
        arrives_within_s: Before the first step, trials on their way are waited for so long.
        fits: Tells whether some trials have room together, given what each needs alone where that
            is known; one alone always gets a seat.
    """

    def __init__(
        self,
        model: MultiAdapterModel,
        run_of: Callable[[Recipe], LoadedRun],
        home: Path,
        *,
        slots: int,
        template: ChatTemplate | None = None,
        judges: RewardModels | None = None,
        lease_s: float = 180.0,
        arrives_within_s: float = 10.0,
        fits: Callable[[Sequence[Recipe], Sequence[float | None]], bool] = lambda *_: True,
    ) -> None:
        self._trainer = Trainer(model, template=template, judges=judges)
        self._run_of = run_of
        self._home = home
        self._num_slots = slots
        self._lease_s = lease_s
        self._arrives_within_s = arrives_within_s
        self._fits = fits
        self._full_at = 0
        """Trials in training beside which the next one had no room; 0 where it was not tried."""
        self._joining: tuple[int, ...] = ()
        """The trial that is being seated: where the pack breaks then, it has its part in that."""
        self._seats: dict[int, _Seat] = {}
        self._expected: dict[int, float] = {}
        """Trial on its way to a seat → when that was said."""
        self._coming: set[int] = set()
        """Trials that take a seat just now."""
        self._ready_s: float | None = None
        """Since when somebody is ready for the next step."""
        self._changed = threading.Condition()
        self._loss: Loss | None = None
        self._closed = False
        self._last_step_s = 0.0
        self._thread = threading.Thread(target=self._loop, name="pack", daemon=True)
        self._thread.start()

    # What trials call, from any thread

    def expect(self, number: int) -> None:
        """Says that a trial is on its way: others wait a moment rather than step without it.

        That is `arrives_within_s` before the pack's first step, when processes are being started,
        and later at most as long as a step takes.
        """
        with self._changed:
            seat = self._seats.get(number)
            if seat is None or seat.leaves:
                self._expected[number] = time.monotonic()

    def join(self, number: int, folder: str, need: float | None = None) -> None:
        """Asks for a seat, and to be trained up to the next report.

        A trial that sits already keeps its seat.

        Args:
            number: Of the trial.
            folder: Its own.
            need: Bytes that it was predicted to take alone; None makes the prediction here.

        Raises:
            GraftError: The trial's recipe does not go with the rows or with the base; or the trial
                has left meanwhile.
        """
        with self._changed:
            if number in self._seats and not self._leaves(number):
                return
            self._coming.add(number)
        recipe = Recipe.model_validate_json((Path(folder) / RECIPE_FILE).read_text())
        try:
            run = self._run_of(recipe)
        except GraftError as error:
            fail_trial(Path(folder), str(error))
            self.leave(number)
            raise
        with self._changed:
            self._changed.wait_for(lambda: self._loss or self._closed or not self._leaves(number))
            if number not in self._seats:
                if number not in self._coming:
                    raise TrainingError(f"trial {number} has left while it took its seat")
                self._seats[number] = _Seat(number, Path(folder), run, run_facts(run), need)
            self._coming.discard(number)
            self._expected.pop(number, None)
            self._changed.notify_all()

    def _leaves(self, number: int) -> bool:
        return number in self._seats and self._seats[number].leaves

    def next_report(self, number: int, after: int, timeout_s: float = 20.0) -> Report | None:
        """Waits for the first report past step `after`, and lets the trial train until then.

        Returns:
            The report, or None where it is not there after `timeout_s`.

        Raises:
            TrainingError: The trial failed, or the pack did, or the trial has no seat.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while True:
                if self._loss is not None:
                    raise TrainingError(self._loss.words)
                seat = self._seats.get(number)
                if seat is None or seat.leaves:
                    raise TrainingError(f"trial {number} has no seat in the pack; it has left")
                seat.renewed_s = time.monotonic()
                if seat.failure is not None:
                    raise TrainingError(seat.failure)
                if seat.report is not None and seat.report["steps"] > after:
                    return seat.report
                if seat.asked_after < after:
                    seat.asked_after = after
                    self._changed.notify_all()
                left = deadline - time.monotonic()
                if left <= 0 or self._closed:
                    return None
                self._changed.wait(min(left, self._lease_s / 4))  # whoever waits renews the lease

    def leave(self, number: int) -> None:
        """Gives the seat up, or the way to it; harmless when repeated."""
        with self._changed:
            self._coming.discard(number)
            self._expected.pop(number, None)
            if (seat := self._seats.get(number)) is not None:
                seat.leaves = True
            self._changed.notify_all()

    def seated(self) -> dict[int, str]:
        """Trials in the pack and what they do."""
        with self._changed:
            return {n: s.state for n, s in self._seats.items() if not s.leaves}

    def loss(self) -> Loss | None:
        """Why the pack broke, and for whom; None where it did not."""
        return self._loss

    def close(self) -> None:
        """Ends the loop after its current step and takes all slots off the base."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    # The loop's own thread

    def _loop(self) -> None:
        try:
            while not self._closed:
                self._remove_leavers()
                self._admit()
                names = self._await_ready()
                if names:
                    self._step(names)
            for name in self._trainer.slots:
                self._trainer.leave(name)
        except Exception as error:
            _log.exception("the pack broke")
            with self._changed:
                self._loss = Loss(
                    f"the pack broke: {type(error).__name__}: {error}",
                    exhausted_bytes(error),
                    (*map(int, self._trainer.slots), *self._joining),
                )
                self._changed.notify_all()

    def _remove_leavers(self) -> None:
        with self._changed:
            now = time.monotonic()
            for seat in self._seats.values():
                if now - seat.renewed_s > self._lease_s and not seat.leaves:
                    _log.warning(
                        "trial %d was abandoned by its runner; its seat is free", seat.number
                    )
                    seat.leaves = True
            leavers = [seat for seat in self._seats.values() if seat.leaves]
            for seat in leavers:
                del self._seats[seat.number]
            self._changed.notify_all()
        for seat in leavers:
            self._vacate(seat)

    def _vacate(self, seat: _Seat) -> None:
        if str(seat.number) in self._trainer.slots:
            self._trainer.leave(str(seat.number))

    def _admit(self) -> None:
        while len(self._trainer.slots) < self._num_slots:
            with self._changed:
                waiting = [s for s in self._seats.values() if s.state == "waiting" and not s.leaves]
            if not waiting:
                return
            seat = waiting[0]
            if not self._has_memory_for(seat):
                self._full_at = len(self._trainer.slots)
                return
            self._full_at = 0
            self._joining = (seat.number,)
            try:
                self._seat(seat)
            except NoRoomError:  # which is no fault of the trial
                raise
            except (GraftError, ValueError, OSError) as error:
                self._fail(seat, str(error))
            self._joining = ()

    def _has_memory_for(self, seat: _Seat) -> bool:
        there = [at for name in self._trainer.slots if (at := self._seats.get(int(name)))]
        together = [*there, seat]
        recipes, needs = [one.run.recipe for one in together], [one.need for one in together]
        return not there or self._fits(recipes, needs)

    def _seat(self, seat: _Seat) -> None:
        self._vacate(seat)  # of an earlier stay, where the trial came back before it was removed
        recipe, past = seat.run.recipe, read_progress(seat.folder, seat.facts)
        if past is not None:
            seat.reported, seat.window = past.state.step, past.window
            seat.seconds, seat.tokens = past.report["seconds"], past.report["tokens"]
        drop_reports_after(seat.folder, seat.reported)
        if past is not None and recipe.train.ends_with(past.report):
            with self._changed:
                seat.report, seat.state = past.report, "done"
                self._changed.notify_all()
            return
        join_run(self._trainer, str(seat.number), seat.run, self._home, past)
        with self._changed:
            seat.state = "training"
            # A resumed trial has been told to go on from here before.
            seat.asked_after = max(seat.asked_after, seat.reported)

    def _await_ready(self) -> list[str]:
        """Waits until a trial may step, and a moment more for those that would step with it.

        Returns:
            Who steps now; nobody where somebody takes a seat first.
        """
        with self._changed:
            self._changed.wait_for(self._has_work, timeout=1.0)
            while (ready := self._ready()) and not self._has_newcomer() and self._waits():
                self._changed.wait(_LOOK_EVERY_S)
            if not ready:
                self._ready_s = None
            return [] if self._has_newcomer() else ready

    def _ready(self) -> list[str]:
        return [str(s.number) for s in self._seats.values() if s.is_ready and not s.leaves]

    def _has_work(self) -> bool:
        return (
            self._closed
            or any(s.is_ready or s.leaves for s in self._seats.values())
            or self._has_newcomer()
        )

    def _has_newcomer(self) -> bool:
        """Tells whether a trial waits that has a seat once those that leave are gone."""
        seats, count = self._seats.values(), len(self._trainer.slots)
        has_room = count < self._num_slots and not count == self._full_at > 0
        is_waiting = any(s.state == "waiting" and not s.leaves for s in seats)
        return is_waiting and (has_room or any(s.leaves for s in seats))

    def _waits(self) -> bool:
        """Tells whether the next step is better done a moment later, with more trials in it."""
        now = time.monotonic()
        self._ready_s = self._ready_s or now
        waited_s = now - self._ready_s
        comes = any(now - said < self._arrives_within_s for said in self._expected.values())
        if self._closed:
            return False
        if not self._last_step_s:
            return comes and waited_s < self._arrives_within_s
        stands = any(
            not (s.is_ready or s.leaves or s.state == "waiting") for s in self._seats.values()
        )
        return (comes or stands) and waited_s < min(_MOMENT_S, self._last_step_s)

    def _step(self, names: list[str]) -> None:
        started = time.monotonic()
        self._ready_s = None
        reports = self._trainer.step(names)
        due: list[_Seat] = []
        for name, step in reports.items():
            seat = self._seats.get(int(name))
            if seat is None:
                continue
            seat.seconds += step.seconds
            seat.tokens += step.num_tokens
            seat.window.append(step)
            with self._failing(seat):
                require_finite(step, seat.run.recipe)
                if step.is_finished or step.step % seat.run.recipe.train.report_every == 0:
                    due.append(seat)
        self._report(due)
        self._last_step_s = time.monotonic() - started

    @contextmanager
    def _failing(self, seat: _Seat) -> Iterator[None]:
        """Ends a trial alone where it breaks, but not where the others would meet the same."""
        try:
            yield
        except NoRoomError:
            raise
        except (GraftError, OSError) as error:
            self._fail(seat, str(error))

    def _report(self, due: Sequence[_Seat]) -> None:
        """Measures trials and writes their checkpoints, each while the next one is measured."""
        writing: list[tuple[_Seat, Future[None]]] = []
        with ThreadPoolExecutor(1, "checkpoint") as writer:
            for seat in due:
                with self._failing(seat):
                    measured = measure(seat.run, str(seat.number), seat.run.recipe.search.eval_rows)
                    wait([written for _, written in writing])  # one copy of weights at a time
                    writing.append(
                        (seat, writer.submit(self._write, seat, *self._found(seat, measured)))
                    )
            for seat, written in writing:
                with self._failing(seat):
                    written.result()
                    if seat.state == "done":
                        self._trainer.leave(str(seat.number))

    def _found(self, seat: _Seat, measured: Mapping[str, float]) -> tuple[SlotState, Report]:
        name = str(seat.number)
        report = report_on(seat.window, seat.seconds, seat.tokens)
        report |= measured
        state = self._trainer.state(name)
        return state, report | costs_of(seat.run, name, state.tensors, report, seat.folder)

    def _write(self, seat: _Seat, state: SlotState, report: Report) -> None:
        recipe = seat.run.recipe
        save_progress(seat.folder, state, report, seat.facts, recipe.search.objectives[0])
        seat.window = []
        with self._changed:
            seat.reported, seat.report = state.step, report
            seat.state = "done" if recipe.train.ends_with(report) else "training"
            self._changed.notify_all()

    def _fail(self, seat: _Seat, reason: str) -> None:
        self._vacate(seat)
        fail_trial(seat.folder, reason)
        with self._changed:
            seat.state, seat.failure = "failed", reason
            self._changed.notify_all()
