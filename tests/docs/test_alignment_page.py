"""The page of compared objectives says what was measured."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "alignment_page.py"


def published() -> dict[str, Any]:
    """The record in `docs`."""
    found: dict[str, Any] = json.loads((DOCS / "alignment.json").read_text(encoding="utf-8"))
    return found


def metric(value: float) -> dict[str, float]:
    """A measured metric."""
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "rows": 320}


def test_each_row_is_one_line_and_the_mean_reward_is_the_sum_of_its_metrics() -> None:
    rows = [
        {"name": "base", "rows": "pairs", "metrics": {"eval/preference_accuracy": metric(0.5)}},
        {
            "name": "dpo",
            "rows": "pairs",
            "steps": 50,
            "seconds": 61.7,
            "metrics": {
                "eval/preference_accuracy": metric(0.8),
                "eval/exact_match": metric(0.25),
                "eval/json_valid": metric(0.5),
            },
        },
    ]
    page = runpy.run_path(str(PAGE))["page"]
    text = page({"base": "some/base", "machine": "2 cores of x86_64", "rows": rows})
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines[2] == "| base | pairs | — | — | 0.500 [0.400, 0.600] | — | — | — |"
    assert lines[3] == (
        "| dpo | pairs | 50 | 62 "
        "| 0.800 [0.700, 0.900] | 0.250 [0.150, 0.350] | 0.500 [0.400, 0.600] | 0.750 |"
    )
    assert len({line.count("|") for line in lines}) == 1
    assert "`some/base`" in text


def test_the_published_page_is_fresh() -> None:
    text = runpy.run_path(str(PAGE))["page"](published())
    assert (DOCS / "alignment.md").read_text(encoding="utf-8") == text


def test_every_objective_is_published_and_better_than_the_start() -> None:
    rows = {(row["name"], row["rows"]): row for row in published()["rows"]}

    def value(name: str, rows_of: str, metric: str) -> float:
        return float(rows[name, rows_of]["metrics"][metric]["value"])

    accuracy, exact = "eval/preference_accuracy", "eval/exact_match"
    assert 0.55 <= value("start", "pairs", accuracy) <= 0.75
    for name in ("dpo", "orpo", "kto"):
        assert value(name, "pairs", accuracy) >= value("start", "pairs", accuracy) + 0.15
        assert value(name, "pairs", exact) >= value("start", "pairs", exact)
        assert rows[name, "pairs"]["metrics"][accuracy]["rows"] >= 300

    def reward(name: str) -> float:
        return sum(value(name, "commands", metric) for metric in (exact, "eval/json_valid"))

    for name in ("grpo", "ppo"):
        assert reward(name) >= reward("start") + 0.2
        assert rows[name, "commands"]["seconds"] <= 30 * 60
