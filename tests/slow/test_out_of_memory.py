"""A trial that really runs out of memory: it alone is infeasible, and the search learns from it.

The whole search, the command's own process and all of Ray's, runs under a limit of the operating
system (`ulimit -d`), which makes the allocator fail as a full machine would. What runs out is a
method of another package that takes memory which no shape tells.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from graft.core.events import read_events
from graft.pipelines.tune import TuneResult
from graft.testing import tiny_model, tiny_tokenizer
from tests.ray.test_search import write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

LIMIT_BYTES = 8 * 2**30
"""Of each process; one that has loaded torch and Ray, and trains, has a quarter of it."""
CAP = "3GB"
COMMAND = "from graft.cli.main import main; main()"

PLUGIN = """
from typing import Any, ClassVar, Literal

import torch

from graft.methods.base import METHODS
from graft.methods.lora import LoraMethod

HOARDS = []


@METHODS.register
class HoardingMethod(LoraMethod):
    '''LoRA that keeps memory of its own from the first step on.'''

    type: Literal["hoarding"] = "hoarding"
    hoards_bytes: int = 0

    acts_after_step: ClassVar[bool] = True

    def after_step(self, *_: Any, **__: Any) -> None:
        HOARDS.append(torch.empty(self.hoards_bytes, dtype=torch.uint8))
"""


def plug_in(folder: Path) -> Path:
    """Installs the method as somebody else's package."""
    installed = folder / "hoarding-1.0.dist-info"
    installed.mkdir(parents=True)
    (folder / "hoarding.py").write_text(PLUGIN)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: hoarding\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text(
        "[graft.method]\nhoarding = hoarding:HoardingMethod\n"
    )
    return folder


def base_model(folder: Path) -> Path:
    """Large enough for a batch of 64 to need many times what a batch of 2 does."""
    tiny_model(hidden_size=384, num_layers=4).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def searched(recipe: Path, home: Path, plugins: Path) -> TuneResult:
    """What `graft tune` says of a search under the limit."""
    limits = (LIMIT_BYTES, LIMIT_BYTES)
    paths = os.pathsep.join([str(plugins), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, "tune", str(recipe), "--home", str(home), "--json"],
        env={**os.environ, "PYTHONPATH": paths, "RAY_worker_niceness": "0"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, limits),
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return TuneResult.model_validate_json(done.stdout)


@pytest.mark.parametrize("executor", ["dedicated", "packed"])
def test_a_trial_that_runs_out_is_infeasible_alone_and_what_needs_as_much_is_not_tried(
    executor: str, data_folder: Path, tmp_path: Path
) -> None:
    hoarder = {"method/hoards_bytes": LIMIT_BYTES, "train/batch_size": 64}
    points: list[dict[str, Any]] = [
        hoarder,
        {"method/hoards_bytes": 0, "train/batch_size": 2},
        {"method/hoards_bytes": 1, "train/batch_size": 2},
        {"method/hoards_bytes": 0, "train/batch_size": 64},
        {"method/hoards_bytes": 2, "train/batch_size": 2},
    ]
    recipe = write_recipe(
        tmp_path,
        base_model(tmp_path / "base"),
        data_folder,
        method={"type": "hoarding", "r": 4, "hoards_bytes": {"choice": [0, 1, 2, LIMIT_BYTES]}},
        train={
            "steps": 8,
            "batch_size": {"choice": [2, 64]},
            "micro_batch_tokens": 4096,
            "report_every": 4,
            "lr": 1e-3,
        },
        scale={"device_memory": CAP},
        search={
            "trials": 4,
            "points": points,
            "executor": executor,
            "scheduler": {"type": "none"},
            "pack_slots": 3,
            "sampler": "random",
            "eval_rows": 4,
        },
    )
    result = searched(recipe, tmp_path / "home", plug_in(tmp_path / "plugins"))

    by_number = {trial.number: trial for trial in result.trials}
    ran_out = by_number[0]
    assert ran_out.state == "infeasible"
    assert ran_out.params == hoarder
    assert ran_out.executor == executor
    assert "out of memory" in str(ran_out.reason)
    assert "needed at least 9." in str(ran_out.reason), "what it had, and 8 GiB that it asked for"
    assert "predictions are multiplied by" in str(ran_out.reason)
    neighbours = [by_number[number] for number in (1, 2, 4)]
    assert [trial.state for trial in neighbours] == ["complete"] * 3
    assert [list(trial.reports) for trial in neighbours] == [[4, 8]] * 3
    events = read_events(Path(result.folder) / "events.jsonl")
    ended = next(at for at, e in enumerate(events) if e["event"] == "end" and e["trial"] == 0)
    later = {e["params"]["train/batch_size"] for e in events[ended:] if e["event"] == "start"}
    assert 64 not in later
    assert result.best.number in (1, 2, 4)
    assert result.num_infeasible == 1, "the point that needs as much, and was not tried"
