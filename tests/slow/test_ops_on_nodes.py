"""Ops are ready on all nodes before workers start, wherever a node keeps them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from graft.recipe.sections import Recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def test_a_node_that_has_no_ops_gets_them_before_its_worker_starts(
    tmp_path: Path, model_folder: Path, data_folder: Path
) -> None:
    recipe = Recipe.model_validate(
        {
            "model": {"source": str(model_folder), "dtype": "fp32", "device": "cpu"},
            "data": {"train": str(data_folder / "train.jsonl")},
            "method": {"type": "lora", "r": 4},
            "train": {"steps": 3, "batch_size": 4, "lr": 1e-3},
            "scale": {
                "workers": 2,
                "zero_stage": 2,
                "offload": {"optimizer": "cpu"},
                "threads": 1,
            },
        }
    )
    path = tmp_path / "recipe.json"
    path.write_text(recipe.model_dump_json())
    done = subprocess.run(
        [sys.executable, "-m", "tests.slow.ops_driver", str(path), str(tmp_path)],
        env={**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0"},
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    facts = json.loads(done.stdout.strip().splitlines()[-1])
    assert facts["nodes_without"] >= 1
    assert facts["said"] == [
        f"building DeepSpeed's ops cpu_adam on {facts['nodes_without']} of 2 nodes; it takes some "
        "minutes, once"
    ]
    assert (facts["nodes_with"], facts["folders"]) == (2, 2)
    assert facts["steps"] == 3
    assert not facts["was_compiled_in_training"]
