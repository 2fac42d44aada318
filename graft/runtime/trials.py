"""The records of a study: what was proposed, what became of it, what must stay the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from pydantic import Field

from graft.artifacts.record import MetricValue
from graft.core.files import sha256_json, write_atomic
from graft.core.model import Listed, StrictModel
from graft.core.spaces import Space

if TYPE_CHECKING:
    from graft.recipe.sections import Recipe

TrialState = Literal["waiting", "running", "paused", "complete", "stopped", "failed", "infeasible"]
"""`paused`: a budget was spent before its end; a larger one goes on from its checkpoint."""
Outcome = Literal["complete", "stopped", "failed"]

STOPPED_BY_PERSON = "a person stopped it"
EARLIER = "earlier"
"""Marks a trial of another study with where it is from."""
CONTINUES = "continues"
"""Marks a trial with the one that it goes on from."""
MEASURED = ("train/", "eval/", "method/", "objective/", "rollout/", "cost/")
"""A metric's name begins so."""

_FAILURE_FILE = "failure.json"
_LOSS_FILE = "lost"
_LEAVE_FILE = "leave"
_WORDS_FILE = "words"


class Suggest(Protocol):
    """Chooses a value: a parameter's name and its range in, a value of that range out."""

    def __call__(self, name: str, space: Space) -> Any:
        """Returns a value; for a choice, one of its values."""


class Sampled(Protocol):
    """A recipe with holes, as the study needs it."""

    def sample(self, suggest: Suggest) -> Recipe:
        """Fills the holes."""


class Asked(NamedTuple):
    """A proposed trial."""

    number: int
    recipe: Recipe
    params: dict[str, Any]


class TrialRecord(StrictModel):
    """What the study knows of one trial."""

    number: int
    state: TrialState
    params: dict[str, Any]
    """Values of the holes, by their names, branches included: `method[lora]/r`."""
    metrics: dict[str, float] = Field(default_factory=dict)
    """The last report."""
    reports: dict[int, float] = Field(default_factory=dict)
    """Step → the searched metric; empty where several are searched."""
    steps: int = 0
    tokens: int = 0
    """Trained on, over all attempts; padding is not counted."""
    seconds: float = 0.0
    """Training time over all attempts."""
    executor: str | None = None
    reason: str | None = None
    """Why it failed, cannot be or is paused."""
    recipe_digest: str | None = None
    rerun_of: int | None = None
    """The searched trial that this one trains again on a fresh seed."""
    continues: int | None = None
    """Trial that it is the further course of."""
    continued_by: int | None = None
    """Trial that it goes on as, which counts instead of it."""

    @property
    def has_ended(self) -> bool:
        """It was run and needs no more work; one that ran out of memory turned out infeasible."""
        was_run = self.state != "infeasible" or self.executor is not None
        is_last = self.continued_by is None
        return was_run and is_last and self.state != "waiting" and not self.is_unfinished

    @property
    def is_unfinished(self) -> bool:
        """It was begun and needs more work."""
        return self.state in ("running", "paused")

    @property
    def uses_budget(self) -> bool:
        """It was run, or is going to be."""
        return self.is_unfinished or self.has_ended

    @property
    def may_go_on(self) -> bool:
        """It ended against somebody's wish, who may want it back: its checkpoint is kept."""
        return self.state == "failed" or self.reason == STOPPED_BY_PERSON


class Failure(StrictModel):
    """Why a trial failed, as far as its runner could tell."""

    reason: str
    needed_bytes: int | None = None
    """Device memory that it asked for at least; None where it did not run out of memory."""


class Loss(NamedTuple):
    """The process behind running trials is gone or useless."""

    words: str
    """Why, as far as it is known."""
    needed_bytes: int | None = None
    """Device memory that it asked for at least, 0 where it was killed for the memory of its node;
    None where it did not run out of memory."""
    trials: tuple[int, ...] = ()
    """Those that were in training; none where it is not known."""


class Winner(StrictModel):
    """The best trial after the search."""

    number: int
    seed: int | None = None
    """Fresh seed of the re-run whose adapter is published; None is the searched trial's own."""
    artifact: str
    """Digest of its published adapter."""
    metrics: dict[str, MetricValue]
    """Over all held-out rows."""


class StudyFacts(StrictModel):
    """What must not change between two runs of one study: results would not compare."""

    space: str
    """Digest of everything in the recipe that shapes a trial."""
    model: str
    """Digest of the base."""
    data: str
    """Digest of the prepared rows."""
    objectives: Listed[str]
    """Searched metrics and their modes, `eval/loss min`."""
    eval_rows: int

    def differences(self, other: StudyFacts) -> list[str]:
        """Says in words what another study has otherwise."""
        words = {
            "space": "other settings or another space",
            "model": "another base model",
            "data": "other data",
            "objectives": "other search.objectives",
            "eval_rows": "another search.eval_rows",
        }
        return [w for field, w in words.items() if getattr(self, field) != getattr(other, field)]


class Earlier(NamedTuple):
    """A complete trial of another study, for the sampler to learn from."""

    source: str
    """Its study and number, `march/7`."""
    params: dict[str, Any]
    """Values of the new study's holes that give the same recipe."""
    metrics: dict[str, float]


def record_of(frozen: Any, continued_by: int | None = None) -> TrialRecord:
    """Reads a trial of Optuna's, as it is kept; and which one it goes on as, if one does."""
    facts = frozen.user_attrs
    states: dict[str, TrialState] = {
        "WAITING": "waiting",
        "RUNNING": "running",
        "COMPLETE": "complete",
        "PRUNED": "stopped",
        "FAIL": "infeasible" if "infeasible" in facts else "failed",
    }
    state = states[frozen.state.name]
    paused = facts.get("paused", "") if state == "running" else ""
    return TrialRecord(
        number=frozen.number,
        state="paused" if paused else state,
        params=frozen.params or frozen.system_attrs.get("fixed_params", {}),
        metrics=facts.get("metrics", {}),
        reports=dict(sorted(frozen.intermediate_values.items())),
        steps=facts.get("steps", 0),
        tokens=facts.get("tokens", 0),
        seconds=facts.get("seconds", 0.0),
        executor=facts.get("executor"),
        reason=facts.get("reason", facts.get("infeasible", paused or None)),
        recipe_digest=facts.get("recipe_digest"),
        rerun_of=facts.get("rerun_of"),
        continues=facts.get(CONTINUES),
        continued_by=continued_by,
    )


def trial_digest(recipe: Recipe) -> str:
    """Names what a trial trains on the base and the rows of its study.

    Where those are is not in it: a copy of the study elsewhere has the same trials.
    """
    sections = ("method", "objective", "train")
    return sha256_json({name: recipe.model_dump(mode="json")[name] for name in sections})


def move_folder(source: Path, target: Path) -> None:
    """Gives a trial's folder the name of its further course, unless it has it already."""
    if source.exists() and not target.exists():
        source.rename(target)


def fail_trial(folder: Path, reason: str, *, needed_bytes: int | None = None) -> None:
    """Keeps why a trial failed, where its driver looks."""
    failure = Failure(reason=reason, needed_bytes=needed_bytes)
    write_atomic(folder / _FAILURE_FILE, failure.model_dump_json())


def failure_of(folder: Path) -> Failure | None:
    """Returns why a trial failed; None where it did not, as far as its runner could tell."""
    path = folder / _FAILURE_FILE
    return Failure.model_validate_json(path.read_bytes()) if path.exists() else None


def lose_trial(folder: Path, reason: str) -> None:
    """Keeps why a trial could not go on where it was, which says nothing of the trial itself."""
    write_atomic(folder / _LOSS_FILE, reason)


def loss_words(folder: Path) -> str | None:
    """Returns why a trial could not go on where it was; None where nobody has told."""
    path = folder / _LOSS_FILE
    return path.read_text() if path.exists() else None


def forget_end(folder: Path) -> None:
    """Makes way for another attempt."""
    for left in (_FAILURE_FILE, _LOSS_FILE, _LEAVE_FILE):
        (folder / left).unlink(missing_ok=True)


def ask_to_leave(folder: Path) -> None:
    """Tells a trial's runner to end after the step it is at; it looks there while it waits."""
    write_atomic(folder / _LEAVE_FILE, "")


def is_asked_to_leave(folder: Path) -> bool:
    """Tells whether a trial is to end after the step it is at."""
    return (folder / _LEAVE_FILE).exists()


def say_of_run(folder: Path, words: str) -> None:
    """Leaves a line for the people at the driver, which takes it from a run's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _WORDS_FILE).open("a", encoding="utf-8") as file:
        file.write(" ".join(words.split()) + "\n")


def take_words(folder: Path) -> list[str]:
    """Returns the lines that a run has left since the last call."""
    path, taken = folder / _WORDS_FILE, folder / f"{_WORDS_FILE}.taken"
    try:
        path.rename(taken)  # who writes at this moment has opened it already
    except FileNotFoundError:
        return []
    words = taken.read_text(encoding="utf-8").splitlines()
    taken.unlink()
    return words


def metrics_of(result: Mapping[str, Any]) -> dict[str, float]:
    """Picks the metrics out of a report."""
    return {
        name: float(value)
        for name, value in result.items()
        if name.startswith(MEASURED) and isinstance(value, int | float)
    }
