"""Sixty trials of five methods where memory is short: none that cannot be, and little disk."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from graft.core.events import read_events
from graft.core.spaces import Choice, Int, Space
from graft.engine.memory.cap import Limits, MemoryCap
from graft.engine.memory.shape import ModelShape
from graft.engine.memory.standing import size_of
from graft.models import find_config
from graft.pipelines.tune import tune
from graft.recipe.load import load_recipe
from graft.recipe.space import RecipeSpace
from graft.testing import tiny_model, tiny_tokenizer
from tests.ray.test_search import pytestmark as of_search
from tests.ray.test_search import write_recipe

pytestmark = [*of_search, pytest.mark.slow, pytest.mark.timeout(1500)]

TRIALS = 60
METHODS: list[dict[str, Any]] = [
    {"type": "lora", "r": {"int": [1, 64]}},
    {"type": "dora", "r": {"choice": [4, 16]}},
    {"type": "bottleneck"},
    {"type": "prefix"},
    {"type": "full"},
]
UNLIMITED = Limits("cpu", 1 << 50, threads=2)


def needs(space: RecipeSpace, home: Path, count: int) -> list[int]:
    """Predicted bytes of so many random points, in order."""
    cap = MemoryCap(ModelShape.of(find_config(space.example().model, home)), UNLIMITED)
    generator = random.Random(0)

    def draw(name: str, of: Space) -> Any:
        if isinstance(of, Int):
            return generator.randint(of.low, of.high)
        assert isinstance(of, Choice)
        return generator.choice(of.values)

    return sorted(int(cap.need([space.sample(draw)])) for _ in range(count))


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_no_trial_is_launched_that_does_not_fit(data_folder: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_model(hidden_size=384, num_layers=4).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    sections: dict[str, Any] = {
        "method": {"choice": METHODS},
        "train": {
            "steps": 4,
            "batch_size": {"choice": [4, 16, 64]},
            "micro_batch_tokens": 2048,
            "report_every": 2,
            "lr": 1e-3,
        },
        "search": {"trials": TRIALS, "pack_slots": 3, "eval_rows": 4, "sampler": "random"},
    }
    found = needs(load_recipe(write_recipe(tmp_path, base, data_folder, **sections)), tmp_path, 60)
    limit = found[len(found) // 2]
    assert found[0] < limit < found[-1]
    sections["scale"] = {"device_memory": str(limit)}
    space = load_recipe(write_recipe(tmp_path, base, data_folder, **sections))

    home = tmp_path / "home"
    result = tune(space, home=home, num_cpus=2)

    assert len(result.trials) == TRIALS
    assert {trial.state for trial in result.trials} <= {"complete", "stopped"}
    assert result.num_infeasible > 0
    cap = MemoryCap(ModelShape.of(find_config(space.example().model, home)), UNLIMITED)
    assert all(cap.fits([space.fix(trial.params)]) for trial in result.trials)
    events = read_events(Path(result.folder) / "events.jsonl")
    started = {event["trial"] for event in events if event["event"] == "start"}
    assert started == {trial.number for trial in result.trials}
    shape = ModelShape.of(find_config(space.example().model, home))
    adapters = sum(4 * size_of(space.fix(trial.params), shape).trained for trial in result.trials)
    assert size(home) <= 1.1 * (size(base) + adapters)
