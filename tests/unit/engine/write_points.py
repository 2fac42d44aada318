"""Saves a run's progress again and again, each time ended at another of its write points.

Run with the compiled `write_points.c` preloaded: `write_points.py FOLDER`. At each point the
process ends in one pass, and the disk is full from there on in another. Each save is a forked
child, so that a crash is one. Prints the names of the points that were met, as JSON.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sys
from itertools import product
from pathlib import Path

import torch

from graft.core.errors import TrainingError
from graft.engine.run_folder import drop_reports_after, read_progress, read_reports, save_progress
from graft.engine.train import SlotState
from graft.recipe.search import SearchObjective

FACTS = {"base": "a digest"}
SEARCHED = SearchObjective(metric="eval/loss", mode="min")
LOSSES = {1: 1.0, 2: 3.0, 3: 2.0, 4: 2.5, 5: 2.2}
"""The first is the best, so a save keeps it and removes another."""

REFUSED = 7
POINTS = ctypes.CDLL(None)
POINTS.point_name.restype = ctypes.c_char_p


def state_at(step: int) -> SlotState:
    weights = {"layer": {"A": torch.full((8, 8), float(step)), "B": torch.arange(16.0) * step}}
    moments = {"layer.A": {"step": torch.tensor(float(step)), "exp_avg": torch.ones(8, 8) * step}}
    return SlotState(step, weights, moments, {"ema": torch.ones(4) * step}, {})


def save(folder: Path, step: int) -> None:
    report = {"steps": step, "seconds": 1.0 * step, "eval/loss": LOSSES[step]}
    save_progress(folder, state_at(step), report, FACTS, SEARCHED)


def save_stopped_at(folder: Path, step: int, mode: str, point: int) -> int:
    """Saves in a child that meets its end at a point; returns the child's exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    POINTS.arm(1 if mode == "crash" else 2, point)
    try:
        save(folder, step)
        code = 0
    except TrainingError:
        code = REFUSED
    except BaseException as error:
        print(f"point {point}: {error!r}", file=sys.stderr)
        code = 1
    os._exit(code)


def points_of(folder: Path, step: int) -> list[str]:
    POINTS.arm(1, 0)
    save(folder, step)
    POINTS.disarm()
    return [POINTS.point_name(index).decode() for index in range(POINTS.points())]


def require(is_so: bool, point: str) -> None:
    if not is_so:
        sys.exit(f"after {point}")


def examine(folder: Path, mode: str, code: int, where: str) -> None:
    """Resumes as a run would, and goes on to the next step."""
    hidden = [f.name for f in folder.rglob(".*.tmp-*")]
    require(mode == "crash" or not hidden, f"{where} there is {hidden}")
    past = read_progress(folder, FACTS)
    require(past is not None, f"{where} nothing to resume from")
    assert past is not None
    step = past.state.step
    require(step in (3, 4), f"{where} step {step} is the newest")
    require(code != 0 or step == 4, f"{where} a save that said nothing is not there")
    for key, value in state_at(step).tensors["layer"].items():
        require(torch.equal(past.state.tensors["layer"][key], value), f"{where} {key} differs")
    drop_reports_after(folder, step)
    steps = [int(report["steps"]) for report in read_reports(folder)]
    require(steps == list(range(1, step + 1)), f"{where} the reports are of {steps}")
    for later in range(step + 1, 6):
        save(folder, later)
    kept = sorted(path.name for path in (folder / "checkpoint").iterdir())
    expected = ["step-00000001", "step-00000004", "step-00000005"]
    require(kept == expected, f"{where} and going on there are {kept}")


def main() -> None:
    root = Path(sys.argv[1])
    torch.set_num_threads(1)
    before = root / "before"
    for step in (1, 2, 3):
        save(before, step)
    shutil.copytree(before, root / "once")
    names = points_of(root / "once", 4)
    for mode, (point, name) in product(("crash", "full"), enumerate(names, start=1)):
        folder = root / f"{mode}-{point}"
        shutil.copytree(before, folder)
        code = save_stopped_at(folder, 4, mode, point)
        where = f"{mode} at point {point} ({name}), exit {code}:"
        require(code in ((9,) if mode == "crash" else (0, REFUSED)), where)
        examine(folder, mode, code, where)
    print(json.dumps(names))


if __name__ == "__main__":
    main()
