"""A run's folder, which is its whole state: `recipe.json`, `report.jsonl`, `checkpoint/`.

A report is kept first and the checkpoint that stands behind it second, so that a checkpoint is
never without its report; reports past the newest checkpoint are dropped on resuming and come again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from graft.core.errors import ConfigError, NoRoomError, TrainingError
from graft.core.events import EventLog, read_events
from graft.core.files import is_disk_full, remove_leftovers, write_atomic
from graft.engine.checkpoint import newest_checkpoint, save_checkpoint
from graft.engine.train import SlotState, StepReport

if TYPE_CHECKING:
    from graft.recipe.search import SearchObjective

RECIPE_FILE = "recipe.json"
REPORTS_FILE = "report.jsonl"
CHECKPOINTS = "checkpoint"
FIGURES = "objective/"
"""What the objective told of itself stands in a report under names that begin so."""

Report = dict[str, float]
"""`steps`, `seconds` and `tokens` of the whole run so far, `train/loss`, `train/tokens_per_s`, ...,
and every measured `eval/...`."""


class Resumed(NamedTuple):
    """Where a run stands."""

    state: SlotState
    report: Report
    """The last one, with seconds and tokens up to the checkpoint; of step 0 where there is none."""
    window: list[StepReport]
    """What the steps since that report did."""


def save_progress(
    folder: Path,
    state: SlotState,
    report: Report,
    facts: dict[str, Any],
    searched: SearchObjective | None = None,
) -> None:
    """Keeps a report and its checkpoint.

    Args:
        folder: The run's.
        state: After the report's last step.
        report: What is said about it.
        facts: JSON that must be equal when the run is continued.
        searched: By which metric of the report one checkpoint is better than another.

    Raises:
        TrainingError: They could not be written; the checkpoint before stands.
    """
    try:
        EventLog(folder / REPORTS_FILE).append("report", **report)
    except OSError as error:
        kind = NoRoomError if is_disk_full(error) else TrainingError
        raise kind(
            f"cannot write {folder / REPORTS_FILE}: {error}; the last checkpoint stands: make room "
            "there and run the same command again"
        ) from error
    score = None
    if searched is not None and searched.metric in report:
        score = float(report[searched.metric]) * (1 if searched.mode == "max" else -1)
    kept = {"report": report, "window": [], "run": facts}
    save_checkpoint(folder / CHECKPOINTS, state, kept, score=score)


def save_between_reports(
    folder: Path,
    state: SlotState,
    report: Report,
    window: Sequence[StepReport],
    facts: dict[str, Any],
) -> None:
    """Keeps a checkpoint where no report is due, so that a run may leave at any step.

    Args:
        folder: The run's.
        state: After the window's last step.
        report: The last one, its seconds and tokens up to now.
        window: The steps since.
        facts: JSON that must be equal when the run is continued.

    Raises:
        TrainingError: It could not be written; the checkpoint before stands.
    """
    steps = [step.model_dump() for step in window]
    kept = {"report": report, "window": steps, "run": facts}
    save_checkpoint(folder / CHECKPOINTS, state, kept)


def read_progress(folder: Path, facts: dict[str, Any]) -> Resumed | None:
    """Finds the newest whole checkpoint; None where there is none.

    Raises:
        ConfigError: It is of a run with other facts.
        TrainingError: All are damaged, or one is of a newer format.
    """
    found = newest_checkpoint(folder / CHECKPOINTS)
    if found is None:
        return None
    state, kept = found
    known, given = kept["run"], json.loads(json.dumps(facts))
    for key in sorted(given.keys() | known.keys()):
        if known.get(key) != given.get(key):
            raise ConfigError(
                f"{folder} holds a run with {key} = {known.get(key)!r}, this recipe has "
                f"{given.get(key)!r}; give this run another name, or remove that folder"
            )
    window = [StepReport.model_validate(step) for step in kept.get("window", ())]
    report = {"tokens": 0, **kept["report"]}  # older checkpoints did not count them
    return Resumed(state, report, window)


def drop_reports_after(folder: Path, steps: int) -> None:
    """Drops what a crash left: files in the making, a torn last line, reports past a checkpoint.

    For the run's one writer.
    """
    remove_leftovers(folder)
    path = folder / REPORTS_FILE
    EventLog(path)
    events = read_events(path)
    kept = [event for event in events if event["steps"] <= steps]
    if len(kept) < len(events):
        write_atomic(path, "".join(json.dumps(event) + "\n" for event in kept))


def read_reports(folder: Path) -> list[Report]:
    """Returns a run's reports in order of steps."""
    return [
        {key: value for key, value in event.items() if key not in ("event", "time_s")}
        for event in read_events(folder / REPORTS_FILE)
    ]


def objective_figures(report: Mapping[str, float]) -> dict[str, float]:
    """Picks out what the objective told of itself, under its own names: for progress lines."""
    found = report.items()
    return {k.removeprefix(FIGURES): v for k, v in found if k.startswith(FIGURES)}
