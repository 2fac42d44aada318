"""The page of benchmarks says what was measured."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "benchmarks_page.py"


def published() -> dict[str, dict[str, Any]]:
    """The records in `docs`, by benchmark."""
    return {path.stem: json.loads(path.read_text()) for path in DOCS.glob("benchmarks/*.json")}


def published_if_there(benchmark: str) -> dict[str, float]:
    """The figures of a benchmark; skips the test where none are published."""
    records = published()
    if benchmark not in records:
        pytest.skip("nothing is published yet")
    figures: dict[str, float] = records[benchmark]["figures"]
    return figures


def test_a_figure_stands_beside_its_spread() -> None:
    table = runpy.run_path(str(PAGE))["table"]
    figures = {"speed_vs_x": 2.0, "speed_vs_x_worst": 1.5, "speed_vs_x_best": 2.25, "loss": 0.5}
    assert table(figures).splitlines()[2:] == [
        "| `speed_vs_x` | 2 | 1.5 | 2.25 |",
        "| `loss` | 0.5 | — | — |",
    ]


def test_a_method_stands_beside_its_rival_with_speed_and_memory() -> None:
    names = ["lora_speed_vs_peft", "lora_speed_vs_peft_worst", "lora_speed_vs_peft_best"]
    figures = dict(zip([*names, "lora_memory_vs_peft"], [1.5, 1.25, 1.75, 0.5], strict=True))
    figures |= {name.replace("lora", "full").replace("peft", "plain"): 1.0 for name in figures}
    rounds = [{"method": "lora", "rival": "peft"}, {"method": "full", "rival": "plain"}]
    table = runpy.run_path(str(PAGE))["methods_table"]({"figures": figures, "rounds": rounds})
    assert table.splitlines()[2:] == [
        "| lora vs PEFT | 1.5 | 1.25 | 1.75 | 0.5 |",
        "| full vs a plain loop | 1 | 1 | 1 | 1 |",
    ]


def test_lora_stands_beside_memory_tuning_and_both_beside_the_base() -> None:
    rounds = [
        {"name": "base", "recall": 0.0, "general_perplexity": 20.0},
        {
            "name": "memory",
            "recall": 0.99,
            "general_perplexity": 20.2,
            "file_bytes": 2_500_000,
            "steps": 160,
        },
    ]
    table = runpy.run_path(str(PAGE))["memory_tuning_table"]({"rounds": rounds})
    assert table.splitlines()[2:] == [
        "| base | 0 | 20 | 1 | — | — |",
        "| memory | 0.99 | 20.2 | 1.01 | 2.5 | 160 |",
    ]


def test_the_published_page_is_fresh() -> None:
    text = runpy.run_path(str(PAGE))["page"](published())
    assert (DOCS / "benchmarks.md").read_text(encoding="utf-8") == text


def test_objectives_are_faster_and_smaller_than_trl_and_ppo_keeps_one_base() -> None:
    figures = published()["objectives"]["figures"]
    for objective in ("dpo", "grpo"):
        assert figures[f"{objective}_speed_vs_trl"] >= 1.5
        assert figures[f"{objective}_memory_vs_trl"] < 1
    assert figures["ppo_memory_vs_sft"] <= 1.25


def test_memory_is_predicted_within_its_bounds() -> None:
    figures = published()["memory"]["figures"]
    assert figures["combinations"] >= 30
    assert figures["activations_at_least_half"] >= 15
    assert figures["median_error"] <= 0.10
    assert figures["worst_underprediction"] <= 0.15


def test_one_run_is_faster_and_smaller_than_trl_and_a_plain_loop() -> None:
    figures = published()["finetune"]["figures"]
    assert figures["tokens_per_s_vs_trl"] >= 2
    assert figures["tokens_per_s_vs_plain_peft"] >= 1.3
    assert figures["memory_vs_trl"] <= 0.7
    assert figures["loss_difference"] <= 0.01


def test_no_method_is_slower_than_pefts_and_lora_and_ia3_are_faster() -> None:
    figures = published_if_there("methods")
    speeds = {
        name.removesuffix("_speed_vs_peft"): value
        for name, value in figures.items()
        if name.endswith("_speed_vs_peft")
    }
    assert min(speeds.values()) >= 0.95, speeds
    assert speeds["lora"] > 1
    assert speeds["ia3"] > 1


def test_facts_are_recalled_and_general_text_is_not_forgotten() -> None:
    figures = published_if_there("memory_tuning")
    assert figures["memory_recall"] >= 0.98
    assert figures["memory_perplexity_vs_base"] <= 1.02
    assert figures["lora_file_bytes"] == pytest.approx(figures["memory_file_bytes"], rel=0.05)


def test_a_search_trains_soon_and_a_further_trial_costs_little() -> None:
    figures = published()["startup"]["figures"]
    assert figures["startup_s"] <= 25
    assert figures["further_trial_s"] <= 0.5
