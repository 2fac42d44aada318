"""The sweep's benchmark on the tiny model: every arm trains the same trials, and goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def run(model_folder: Path, folder: Path, *flags: str) -> tuple[dict[str, Any], str]:
    """Runs the benchmark in one work folder; returns its file and what it printed."""
    command = ["-m", "benchmarks.sweep", "--quick", "--dtype", "fp32", "--threads", "2", *flags]
    given = {"model": model_folder, "home": folder / "home", "work": folder / "work"}
    given["json"] = folder / "out.json"
    paths = [argument for name, path in given.items() for argument in (f"--{name}", str(path))]
    ended = subprocess.run(
        [sys.executable, *command, *paths],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads((folder / "out.json").read_text()), ended.stdout


def test_arms_agree_trial_by_trial_and_what_was_measured_is_kept(
    model_folder: Path, tmp_path: Path
) -> None:
    found, told = run(model_folder, tmp_path)
    arms = {(arm["kind"], arm["size"]): arm for arm in found["rounds"][0]["arms"]}
    assert set(arms) == {
        ("tune", 1),
        ("tune", 2),
        ("trl", 1),
        ("ours", 8),
        ("ours_one_step", 8),
    }
    for arm in arms.values():
        assert told.count(f"round 0: {arm['kind']}-64-{arm['size']}:") == 1
        assert len(arm["held_out_losses"]) == 4
        assert 0 < arm["startup_s"] < arm["makespan_s"]
    theirs = arms["trl", 1]["held_out_losses"]
    assert arms["ours", 8]["held_out_losses"] == pytest.approx(theirs, rel=1e-3)
    figures = found["figures"]
    assert figures["winner_same"] == 1.0
    for name in ("makespan_vs_fresh_trl_64", "makespan_vs_tune_reused_64", "further_trial_s"):
        assert figures[f"{name}_worst"] > 0

    more, told = run(model_folder, tmp_path, "--asha")
    kept = [arm for arm in more["rounds"][0]["arms"] if not arm["has_asha"]]
    assert kept == found["rounds"][0]["arms"]
    assert [line.split(":")[1].strip() for line in told.splitlines() if "round 0" in line] == [
        f"tune-64-{int(figures['tune_reused_actors_64'])}-asha",
        "ours-64-8-asha",
    ]
    assert more["figures"]["makespan_vs_tune_reused_64_asha"] > 0
