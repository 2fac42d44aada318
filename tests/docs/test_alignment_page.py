"""The page of compared objectives says what was measured."""

from __future__ import annotations

import runpy
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "alignment_page.py"


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
