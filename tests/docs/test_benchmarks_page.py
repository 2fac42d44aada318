"""The page of benchmarks says what was measured."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "benchmarks_page.py"


def published() -> dict[str, dict[str, Any]]:
    """The records in `docs`, by benchmark."""
    return {path.stem: json.loads(path.read_text()) for path in DOCS.glob("benchmarks/*.json")}


def test_a_figure_stands_beside_its_spread() -> None:
    table = runpy.run_path(str(PAGE))["table"]
    figures = {"speed_vs_x": 2.0, "speed_vs_x_worst": 1.5, "speed_vs_x_best": 2.25, "loss": 0.5}
    assert table(figures).splitlines()[2:] == [
        "| `speed_vs_x` | 2 | 1.5 | 2.25 |",
        "| `loss` | 0.5 | — | — |",
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
