"""The arms of the sweep: each is begun cold and timed to its last trial's result."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from benchmarks._sweep_ours import points_of, search_recipe, task_file
from benchmarks._sweep_task import read_task
from graft.artifacts import Store
from graft.core.events import read_events
from graft.recipe.load import to_yaml

ROOT = Path(__file__).parents[1]
PACK = 8
"""Slots of a pack, as `graft tune` has by default."""
ASHA_REPORTS = 4
"""Of a trial that may be stopped: the rungs are a quarter, a half and all of its steps."""

Measured = dict[str, Any]


class Arm(NamedTuple):
    """Something that is timed."""

    kind: Literal["trl", "tune", "ours", "ours_one_step"]
    tokens: int
    """Of a step of a trial."""
    size: int = 1
    """Slots of our packs, Tune's actors."""
    has_asha: bool = False

    @property
    def name(self) -> str:
        """Names its files."""
        return f"{self.kind}-{self.tokens}-{self.size}{'-asha' if self.has_asha else ''}"


def run_arm(options: argparse.Namespace, arm: Arm, folder: Path) -> Measured:
    """Runs an arm to its end.

    Args:
        options: Of the command line.
        arm: What is run.
        folder: An empty one for its files.

    Returns:
        `makespan_s`, `startup_s` (its part until the first training step is done), held-out losses
        and steps of the trials in the order of the points, and the folder of the winner's adapter;
        of ours also what start-up and the trials past the first are made of.
    """
    return _RUNNERS[arm.kind](options, arm, folder)


def run_rival(
    options: argparse.Namespace, module: str, task: Path, number: int, out: Path, *flags: str
) -> None:
    """Runs a rival's module to its end; what it found lies in `out`."""
    command = ["-m", f"benchmarks.{module}", str(task), str(number), str(out), *flags]
    _run_python(options, command, out / "log")


def _run_trl(options: argparse.Namespace, arm: Arm, folder: Path) -> Measured:
    task = task_file(options, arm.tokens)
    began, startup, trials = time.time(), 0.0, []
    for index in range(options.trials):
        started = time.time()
        run_rival(options, "_sweep_trl", task, index, folder)
        trials.append(json.loads((folder / f"{index}.json").read_text()))
        startup += trials[-1]["first_step_s"] - started  # of every process
    return _measured(trials, began, startup)


def _run_tune(options: argparse.Namespace, arm: Arm, folder: Path) -> Measured:
    task = task_file(options, arm.tokens)
    if arm.has_asha:
        every = _report_every(options, has_asha=True)
        stopping = replace(read_task(task), report_every=every)
        task = folder / "task.json"
        stopping.save(task)
    began = time.time()
    run_rival(options, "_sweep_tune", task, arm.size, folder, *(["--asha"] if arm.has_asha else []))
    trials = json.loads((folder / "trials.json").read_text())
    return _measured(trials, began, min(trial["first_step_s"] for trial in trials) - began)


def _measured(trials: list[dict[str, Any]], began: float, startup: float) -> Measured:
    """Sums a rival's trials up; the winner is the best of those that ran to their end."""
    complete = [trial for trial in trials if trial["adapter"] is not None]
    return {
        "makespan_s": max(trial["ended_s"] for trial in trials) - began,
        "startup_s": startup,
        "held_out_losses": [trial["held_out_loss"] for trial in trials],
        "steps": [trial["steps"] for trial in trials],
        "winner": min(complete, key=lambda trial: trial["held_out_loss"])["adapter"],
    }


def _run_ours(options: argparse.Namespace, arm: Arm, folder: Path) -> Measured:
    """Runs `graft tune`.

    Its first step is taken to be done as long before the first report as the steps behind it took:
    that report's measurement counts as start-up.
    """
    recipe, home = folder / "recipe.yaml", options.work / "home"
    recipe.write_text(to_yaml(_recipe(options, arm)), encoding="utf-8")
    command = ["-m", "graft.cli", "tune", str(recipe), "--home", str(home), "--json"]
    began = time.time()
    result = json.loads(_run_python(options, command, folder / "log"))
    study = Path(result["folder"])
    events = read_events(study / "events.jsonl")
    ended = max(e["time_s"] for e in events if e["event"] == "end")
    trials = sorted(result["trials"], key=lambda trial: _place(options, trial["params"]))
    lost = [trial["reason"] for trial in trials if trial["state"] not in ("complete", "stopped")]
    if lost or len(trials) != options.trials:
        raise SystemExit(f"{arm.name}: {len(trials)} trials; lost were {lost}")
    reports = [read_events(study / "trials" / str(t["number"]) / "report.jsonl") for t in trials]
    first = min((of[0] for of in reports), key=lambda report: report["time_s"])
    until = {name: time_s - began for name, time_s in _stages(study, events).items()}
    shutil.rmtree(study)
    return {
        "makespan_s": ended - began,
        "startup_s": first["time_s"] - first["seconds"] * (1 - 1 / first["steps"]) - began,
        "held_out_losses": [trial["metrics"]["eval/loss"] for trial in trials],
        "steps": [trial["steps"] for trial in trials],
        "winner": str(Store(home).open(result["artifact"]).path),
        "trained_s": [of[-1]["seconds"] for of in reports],
        "first_trained_s": first["seconds"],
        "after_first_report_s": ended - first["time_s"],
        "until_s": until,
    }


def _stages(study: Path, events: list[dict[str, Any]]) -> dict[str, float]:
    """Tells when a search had passed the stages of its start-up, in Unix seconds."""
    firsts: dict[str, float] = {}
    for event in events:
        firsts.setdefault(event["event"], event["time_s"])
    return {
        "checked": (study / "recipe.yaml").stat().st_mtime,  # written once all is proved
        "ray": firsts["sampler"],
        "base": firsts["pack"],
        "trial": firsts["start"],
    }


def _recipe(options: argparse.Namespace, arm: Arm) -> dict[str, Any]:
    """What `graft tune` is given; the study is a new one."""
    every = _report_every(options, has_asha=arm.has_asha)
    asha = {"type": "asha", "grace_steps": every, "reduction_factor": 2}
    content = search_recipe(
        options,
        arm.tokens,
        pack_slots=arm.size,
        scheduler=asha if arm.has_asha else {"type": "none"},
    )
    content["name"] = f"sweep-{uuid.uuid4().hex[:12]}"
    content["train"]["report_every"] = every
    if arm.kind == "ours_one_step":
        content["train"] |= {"steps": 1, "report_every": 1}
        content["search"] |= {"eval_rows": 1}
    return content


def _report_every(options: argparse.Namespace, *, has_asha: bool) -> int:
    return max(1, options.steps // ASHA_REPORTS) if has_asha else int(options.steps)


def _place(options: argparse.Namespace, params: dict[str, Any]) -> int:
    """Returns which of the points a trial has."""
    given = (params["method/r"], params["method/lora_alpha"], params["train/lr"])
    return points_of(options.seed, options.trials).index(given)


_RUNNERS: dict[str, Callable[[argparse.Namespace, Arm, Path], Measured]] = {
    "trl": _run_trl,
    "tune": _run_tune,
    "ours": _run_ours,
    "ours_one_step": _run_ours,
}


def _run_python(options: argparse.Namespace, command: list[str], log: Path) -> str:
    """Runs Python in the environment that all arms have; returns what it wrote to stdout.

    Raises:
        SystemExit: It failed.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    given = {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": str(options.threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # as ours has it
    }
    with log.open("a", encoding="utf-8") as told:
        ended = subprocess.run(
            [sys.executable, *command],
            env=os.environ | given,
            stdout=subprocess.PIPE,
            stderr=told,
            text=True,
            check=False,
        )
    if ended.returncode:
        words = "\n".join(log.read_text(encoding="utf-8").splitlines()[-20:])
        raise SystemExit(f"{' '.join(command)} ended with {ended.returncode}:\n{words}")
    return ended.stdout
