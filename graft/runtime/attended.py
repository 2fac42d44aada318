"""A search that people act on while it runs: its driver takes their requests."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from graft.core.errors import ConfigError, StoppedError
from graft.core.events import EventLog
from graft.runtime.control import apply, require_possible, stopped
from graft.runtime.requests import (
    EVENTS_FILE,
    StudyAnswer,
    StudyRequest,
    asked_s,
    keep_answer,
    open_requests,
    read_request,
)
from graft.runtime.storage import DRIVER
from graft.runtime.trials import ask_to_leave, take_words

if TYPE_CHECKING:
    from graft.core.progress import Progress
    from graft.recipe.space import RecipeSpace
    from graft.runtime.budget import Budget
    from graft.runtime.searcher import StudySearcher, TrialQueue
    from graft.runtime.study import Study

_LOOK_EVERY_S = 1.0
_FINALS = " while its finalists were trained again"


class Attendant:
    """Does what people ask of the study that this process drives.

    While the finalists of a search are trained again, it is the search that people name: their
    wishes are looked for there, and its end is the end of the re-runs.

    Args:
        study: Opened to be driven.
        space: What is searched.
        budget: Of the study; told which trial goes on as which.
        progress: Told what was done.
        searched: The search, opened too, and its space, where the study is of its re-runs.
    """

    def __init__(
        self,
        study: Study,
        space: RecipeSpace,
        budget: Budget,
        progress: Progress,
        *,
        searched: tuple[Study, RecipeSpace] | None = None,
    ) -> None:
        self._study = study
        self._space = space
        self._budget = budget
        self._searched = searched
        self._folder = study.folder if searched is None else searched[0].folder
        self._say = EventLog(self._folder / EVENTS_FILE).append
        self._progress = progress
        self._looked = 0.0

    def begin(self) -> None:
        """Does what was asked of an earlier driver, who did not come to it; call before a queue.

        A wish to end that search is over with it.
        """
        began_s = (self._folder / DRIVER).stat().st_mtime
        for path in open_requests(self._folder):
            request = read_request(path)
            ends_search = request is not None and request.trial is None
            if ends_search and asked_s(path) >= began_s:
                continue
            self._answer(path, request, self._apply)

    def look(self, controller: Any, queue: TrialQueue, searcher: StudySearcher) -> None:
        """Does what has been asked since the last look.

        Args:
            controller: Tune's, which runs trials of this turn.
            queue: Whose trials these are.
            searcher: That gave them to Tune.

        Raises:
            StoppedError: The search was asked to end.
        """
        if time.monotonic() - self._looked < _LOOK_EVERY_S:
            return
        self._looked = time.monotonic()
        at_work = {t.config["trial"]: t for t in controller.get_trials() if not t.is_finished()}
        self._pass_on(at_work)
        for path in open_requests(self._folder):
            request = read_request(path)
            at_work = {n: t for n, t in at_work.items() if not t.is_finished()}
            if request is not None and request.trial is None:
                self._end(path, request, list(at_work))
            if self._searched is not None:  # at work are its re-runs, of other numbers
                self._answer(path, request, self._apply)
                continue
            trial = at_work.get(request.trial) if request is not None else None
            if trial is not None and trial.status == Trial.PENDING:
                continue  # its process is being started; it is stopped once it runs
            if trial is not None and request is not None and request.action == "stop":
                self._answer(path, request, partial(self._stop, trial, controller, searcher))
            else:
                self._answer(path, request, partial(self._apply_in_line, queue))

    def _pass_on(self, numbers: Iterable[int]) -> None:
        """Says what trials have left to be said."""
        for number in numbers:
            for words in take_words(self._study.trial_folder(number)):
                self._say("note", trial=number, words=words)
                self._progress.note(f"trial {number}: {words}")

    def _apply(self, request: StudyRequest) -> StudyAnswer:
        if self._searched is not None:
            answer = apply(*self._searched, request)
            words = f"{answer.words}. Its finalists are trained now; the next `graft tune` runs it"
            return answer.model_copy(update={"words": words})
        answer = apply(self._study, self._space, request)
        if request.action == "resume" and request.trial is not None and answer.trial is not None:
            self._budget.move(request.trial, answer.trial)
        return answer

    def _apply_in_line(self, queue: TrialQueue, request: StudyRequest) -> StudyAnswer:
        answer = self._apply(request)
        if request.action == "stop" and request.trial is not None:
            queue.withdraw(request.trial)
        if request.action == "resume" and answer.trial is not None:
            queue.take_up(answer.trial)
        return answer

    def _stop(
        self, trial: Any, controller: Any, searcher: StudySearcher, request: StudyRequest
    ) -> StudyAnswer:
        require_possible(self._study, self._space, request)
        number = trial.config["trial"]
        ask_to_leave(self._study.trial_folder(number))
        searcher.stop(number)
        controller.stop_trial(trial)
        state = self._study.trial(number).state
        if state != "stopped":
            raise ConfigError(f"trial {number} has ended by itself: it is {state}")
        return stopped(self._study, number)

    def _end(self, path: Path, request: StudyRequest, at_work: list[int]) -> NoReturn:
        for number in at_work:
            ask_to_leave(self._study.trial_folder(number))
        records, of_all = self._study.records, self._study.section.trials
        left = [str(trial.number) for trial in records.unfinished if trial.state == "running"]
        of_search, kind = ("", "trial") if self._searched is None else (_FINALS, "re-run")
        words = (
            f"a person stopped study {self._folder.name!r}{of_search}: {records.num_ended} of "
            f"{of_all} {kind}s have ended"
        )
        if left:
            words += f", half-trained ones keep their checkpoints ({kind} {', '.join(left)})"
        keep_answer(self._say, path, request, StudyAnswer(words=words))
        raise StoppedError(f"{words}. The same command goes on")

    def _answer(
        self,
        path: Path,
        request: StudyRequest | None,
        do: Callable[[StudyRequest], StudyAnswer],
    ) -> None:
        if request is None and not path.exists():
            return  # taken back
        try:
            if request is None:
                raise ConfigError(f"{path} is no request; `graft study` writes them")
            answer = do(request)
            self._progress.note(f"as asked: {answer.words}")
        except ConfigError as error:
            answer = StudyAnswer(is_refused=True, words=str(error))
        keep_answer(self._say, path, request, answer)


class AttendedScheduler(FIFOScheduler):
    """Another scheduler's decisions, and those of people beside it.

    Tune lets a scheduler, and nothing else, stop a trial between two reports.

    Args:
        scheduler: Decides at reports.
        look: Called many times a second with Tune's controller.
    """

    def __init__(self, scheduler: TrialScheduler, look: Callable[[Any], None]) -> None:
        super().__init__()
        self._scheduler = scheduler
        self._look = look

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """Looks what people ask first."""
        self._look(tune_controller)
        return self._scheduler.choose_trial_to_run(tune_controller)

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Passes it on."""
        self._scheduler.on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Passes it on."""
        return str(self._scheduler.on_trial_result(tune_controller, trial, result))

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """Passes it on."""
        self._scheduler.on_trial_complete(tune_controller, trial, result)

    def debug_string(self) -> str:
        """Describes the scheduler."""
        return str(self._scheduler.debug_string())

    def __reduce__(self) -> tuple[Any, ...]:
        return (FIFOScheduler, ())  # Tune pickles it into a snapshot that nobody reads
