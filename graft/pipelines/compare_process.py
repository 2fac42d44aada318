"""Processes for the units of a comparison: a crash in one is a sentence here, not an end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from graft.core import errors
from graft.core.errors import GraftError, TrainingError
from graft.core.progress import Progress, Task
from graft.pipelines.compare_unit import UnitRequest, UnitSpec

RunUnit = Callable[[UnitSpec, Path, Progress], str]
"""Does a unit and returns its result as JSON; the path is for its log."""

_END_S = 10.0


class UnitCrashError(TrainingError):
    """A unit ended without a result; the same comparison, run again, tries it anew."""


class UnitProcesses:
    """Does units in processes; a context manager that leaves none behind.

    A final training has a process of its own: its speed and memory are its alone. What comes before
    it, the bare base and the points of a search, is measured for its quality only, and one process
    does all of it that stands on the same base: libraries and base are loaded once.
    """

    def __init__(self) -> None:
        self._process: _UnitProcess | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()

    def __call__(self, spec: UnitSpec, log: Path, progress: Progress) -> str:
        """Does a unit to its end, and ends its process if this one is interrupted.

        Raises:
            GraftError: What the unit raised.
            UnitCrashError: Its process died, or broke in a way that nobody foresaw.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("", encoding="utf-8")
        if self._process is None or not spec.may_follow(self._process.last):
            self._end()
            self._process = _UnitProcess(spec, log)
        try:
            return self._process.do(spec, log, progress)
        except BaseException:
            self._end()
            raise

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.end()


class _UnitProcess:
    """One process, and the unit that it was given last."""

    def __init__(self, spec: UnitSpec, log: Path) -> None:
        self.last = spec
        with log.open("a", encoding="utf-8") as errors_to:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "graft.pipelines.compare_unit"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors_to,
                text=True,
                encoding="utf-8",
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._events = self._process.stdin, self._process.stdout

    def do(self, spec: UnitSpec, log: Path, progress: Progress) -> str:
        """Does a unit; after an error the process is at its end."""
        self.last = spec
        with suppress(BrokenPipeError):  # if it died at once, its log says why
            request = UnitRequest(spec=spec, log=str(log.absolute()))
            self._requests.write(request.model_dump_json() + "\n")
            self._requests.flush()
        result = _follow(self._events, progress)
        if result is None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_S)
            self.end()
            raise UnitCrashError(_how_it_died(self._process.returncode, log))
        return result

    def end(self) -> None:
        """Ends the process, which has nothing to save."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_END_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        with suppress(BrokenPipeError):
            self._requests.close()
        self._events.close()


def _follow(lines: IO[str], progress: Progress) -> str | None:
    """Replays the unit's progress; returns its result, or None where it ended without one."""
    tasks: dict[int, Task] = {}
    try:
        for line in lines:
            event = json.loads(line)
            kind = event["event"]
            if kind == "result":
                return json.dumps(event["result"], ensure_ascii=False)
            if kind == "error":
                raise _error(event)
            _replay(kind, event, tasks, progress)
    finally:
        for task in tasks.values():
            task.close()
    return None


def _replay(kind: str, event: dict[str, Any], tasks: dict[int, Task], progress: Progress) -> None:
    if kind == "task":
        tasks[event["task"]] = progress.task(event["label"], event["total"], event["unit"])
    elif kind == "advance":
        tasks[event["task"]].advance(event["amount"], **event["fields"])
    elif kind == "close":
        tasks[event["task"]].close()
    else:
        progress.note(event["text"])


def _error(event: dict[str, Any]) -> GraftError:
    kind = getattr(errors, event["type"], TrainingError)
    error: GraftError = kind(event["message"])
    return error


def _how_it_died(code: int, log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    last = f"; its last words: {lines[-1][:300]}" if lines else ""
    if code < 0:
        name = signal.Signals(-code).name
        memory = " (out of memory?)" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{memory}{last}; the log is {log}"
    return f"its process ended with exit code {code}{last}; the log is {log}"
