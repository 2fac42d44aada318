"""The page of techniques is made of the figures that the benchmark writes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def module_at(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAGE = module_at(DOCS / "techniques_page.py")


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark, which is run from the top of the checkout."""
    monkeypatch.syspath_prepend(str(ROOT))
    return module_at(ROOT / "benchmarks" / "techniques.py")


def round_of(name: str, peaks: list[int], rate: float) -> dict[str, Any]:
    return {"technique": name, "peak_bytes": peaks, "tokens_per_s": rate}


ROUNDS = [
    round_of("full", [4_000_000_000], 100.0),
    round_of("lora", [1_000_000_000], 150.0),
    round_of("zero0", [4_000_000_000, 3_900_000_000], 50.0),
    round_of("zero3", [2_000_000_000, 1_500_000_000], 40.0),
]


def test_methods_are_compared_with_one_process_and_zero_with_undivided_workers(
    benchmark: ModuleType,
) -> None:
    figures = benchmark.figures_of(ROUNDS)
    assert figures["lora_memory_vs_full"] == pytest.approx(0.25)
    assert figures["lora_speed_vs_full"] == pytest.approx(1.5)
    assert figures["zero3_memory_vs_full"] == pytest.approx(0.5)
    assert figures["zero3_speed_vs_full"] == pytest.approx(0.8)
    assert figures["zero3_host_gb"] == pytest.approx(3.5)
    assert "full_memory_vs_full" not in figures


def test_the_page_has_a_line_for_each_technique_that_was_measured(benchmark: ModuleType) -> None:
    record = {
        "figures": benchmark.figures_of(ROUNDS),
        "settings": {
            "model": "somewhere/base",
            "dtype": "bf16",
            "batch_size": "8",
            "micro_batch_tokens": "512",
            "workers": "2",
        },
        "machine": {"cores": 2, "cpu": "x86_64"},
    }
    page = PAGE.page(record)
    assert "| LoRA | 1.00 | 0.25 | 1.00 | 150 | 1.50 |" in page
    assert "| ZeRO-3 | 2.00 | 0.50 | 3.50 | 40 | 0.80 |" in page
    assert "DoRA" not in page
    assert "`base`, bf16" in page


def test_every_technique_of_the_benchmark_has_a_row_and_is_a_recipe(benchmark: ModuleType) -> None:
    from graft.recipe.sections import Recipe

    assert set(benchmark.TECHNIQUES) == set(PAGE.ALONE) | set(PAGE.DIVIDED)
    options = benchmark.options_of(["--json", "out.json"])
    for technique in benchmark.TECHNIQUES.values():
        recipe = Recipe.model_validate(benchmark.recipe_of(technique, options))
        assert recipe.scale.max_workers == (2 if technique.against == "zero0" else 1)


@pytest.mark.skipif(not (DOCS / "techniques.json").exists(), reason="nothing is published yet")
def test_the_published_page_is_fresh() -> None:
    record = json.loads((DOCS / "techniques.json").read_text(encoding="utf-8"))
    written = (DOCS / "techniques.md").read_text(encoding="utf-8")
    assert written == PAGE.page(record), "run: python docs/techniques_page.py"
