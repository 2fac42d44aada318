"""What people ask of a study that another process drives: a file a request, in `requests/`.

Only its driver changes a study. It looks into the folder every second, does what it finds in the
order of asking, and says in `events.jsonl` what became of it.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from graft.core.events import read_events
from graft.core.files import write_atomic
from graft.core.model import StrictModel

EVENTS_FILE = "events.jsonl"

_FOLDER = "requests"
_EVENT = "request"


class StudyRequest(StrictModel):
    """One wish."""

    action: Literal["stop", "resume", "clone"]
    trial: int | None = None
    """None for the whole search, which can be stopped."""
    values: dict[str, Any] = Field(default_factory=dict)
    """Of a clone: open setting → its value, where it is not the trial's."""


class StudyAnswer(StrictModel):
    """What became of a wish."""

    is_refused: bool = False
    words: str
    trial: int | None = None
    """The trial that was stopped, goes on or is proposed."""


def leave_request(folder: Path, request: StudyRequest) -> Path:
    """Puts a request where the driver of a study looks; returns its file."""
    path = folder / _FOLDER / f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.json"
    write_atomic(path, request.model_dump_json())
    return path


def withdraw_request(path: Path) -> bool:
    """Takes a request back; False where the driver has taken it."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True


def open_requests(folder: Path) -> list[Path]:
    """Returns the files of requests that nobody has answered, in the order of asking."""
    return sorted((folder / _FOLDER).glob("*.json"))


def asked_s(path: Path) -> float:
    """Returns when a request was made, in Unix seconds; 0 where its name does not say."""
    nanoseconds = path.stem.partition("-")[0]
    return int(nanoseconds) / 1e9 if nanoseconds.isdecimal() else 0.0


def read_request(path: Path) -> StudyRequest | None:
    """Reads a request; None where it has been withdrawn, or is none."""
    try:
        return StudyRequest.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def keep_answer(
    say: Callable[..., object], path: Path, request: StudyRequest | None, answer: StudyAnswer
) -> None:
    """Says in the study's events what became of a request, and removes its file. For the driver."""
    asked = {} if request is None else {"asked": request.model_dump(mode="json")}
    say(_EVENT, id=path.stem, **asked, answer=answer.model_dump(mode="json"))
    path.unlink(missing_ok=True)


def answer_of(folder: Path, path: Path) -> StudyAnswer | None:
    """Returns what became of a request; None where the driver has not come to it."""
    for event in reversed(read_events(folder / EVENTS_FILE)):
        if event["event"] == _EVENT and event["id"] == path.stem:
            return StudyAnswer.model_validate(event["answer"])
    return None
