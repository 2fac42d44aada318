"""The benchmark of start-up on the tiny model: its stages follow each other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_the_stages_of_a_start_are_told_in_their_order(model_folder: Path, tmp_path: Path) -> None:
    given = {"model": model_folder, "home": tmp_path / "home", "json": tmp_path / "out.json"}
    paths = [argument for name, path in given.items() for argument in (f"--{name}", str(path))]
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.startup", "--quick", "--dtype", "fp32", *paths],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    figures = json.loads((tmp_path / "out.json").read_text())["figures"]
    stages = [figures[f"until_{name}_s"] for name in ("checked", "ray", "base")]
    assert 0 < stages[0] < stages[1] < stages[2] < figures["startup_s"]
    assert stages[1] < figures["until_trial_s"] < figures["startup_s"]
    assert 1 <= figures["first_step_trials"] <= 8
    assert figures["further_trial_s"] > 0
