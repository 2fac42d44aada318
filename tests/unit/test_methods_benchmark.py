"""The race of the methods: in every one both sides learn the same before anything is timed."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from types import ModuleType

import pytest

from graft.methods.base import METHODS

ROOT = Path(__file__).parents[2]
NAMES = (
    *("lora", "ia3", "dora", "qlora", "qdora", "adalora", "prompt", "prefix", "ptuning"),
    *("peft", "full", "half", "bottleneck", "memory", "mixture"),
)


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark, which is run from the top of the checkout."""
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.methods")


def test_every_method_is_raced_and_lora_and_dora_on_a_quantized_base_too(
    benchmark: ModuleType,
) -> None:
    assert set(benchmark.METHODS) == set(NAMES) == {*METHODS.names(), "qlora", "qdora"}


@pytest.mark.parametrize("name", NAMES)
def test_both_sides_learn_the_same(
    name: str, benchmark: ModuleType, model_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    options = argparse.Namespace(model=str(model_folder), dtype="fp32", batch_size=4)
    content = benchmark.recipe_of(benchmark.METHODS[name], options)
    content["data"]["train"] = str(data_folder / "train.jsonl")
    given = (content, str(tmp_path / "home"), str(tmp_path / "start"))
    sides = {
        "ours": benchmark.build(benchmark.Ours, *given),
        "theirs": benchmark.build(benchmark.Theirs, *given),
    }
    losses = {side: [made.step() for _ in range(3)] for side, made in sides.items()}
    assert losses["ours"][0] != losses["ours"][-1]
    race = importlib.import_module("benchmarks._race")
    race.require_agreement(name, losses, race.LOSSES_AGREE["fp32"])


@pytest.mark.parametrize(
    ("name", "rival"), [("lora", "peft"), ("ptuning", "peft"), ("half", "plain")]
)
def test_a_figure_names_the_rival(name: str, rival: str, benchmark: ModuleType) -> None:
    options = argparse.Namespace(model="somewhere", dtype="fp32", batch_size=4)
    assert benchmark.rival_of(benchmark.recipe_of(benchmark.METHODS[name], options)) == rival
    sides = {"ours": [1.0, 2.0], "theirs": [2.0, 3.0]}
    row = {"method": name, "rival": rival, "step_seconds": sides}
    figures = benchmark.figures_of([{**row, "peak_bytes": {"ours": 1, "theirs": 4}}])
    assert figures[f"{name}_speed_vs_{rival}"] == pytest.approx(1.75)
    assert figures[f"{name}_memory_vs_{rival}"] == pytest.approx(0.25)
