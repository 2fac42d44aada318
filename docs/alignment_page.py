"""Writes `alignment.md` from measured figures: `python docs/alignment_page.py [RECORD]`.

RECORD is the `alignment.json` that `examples/alignment/run.py` wrote; it is copied to `docs/`, so
that the published figures are the measured ones. Without it the copy is read again.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
RECORD, PAGE = (DOCS / f"alignment.{kind}" for kind in ("json", "md"))
REWARDS = ("eval/json_valid", "eval/exact_match")
"""Each of weight 1, as in the recipes that learn from rewards."""
COLUMNS = {
    "preference accuracy": "eval/preference_accuracy",
    "exact match": "eval/exact_match",
    "valid JSON": "eval/json_valid",
}

HEAD = """# Objectives compared

Written by `python docs/alignment_page.py` from `alignment.json`, which `examples/alignment/run.py`
measured. The data and the recipes: [examples/alignment](../examples/alignment/README.md)."""

HOW = """Every row but the base goes on from `start`. `pairs` are the 320 held-out commands that
correct themselves, `commands` the 300 held-out plain ones. Preference accuracy is the share of
pairs whose right action has the higher log-probability a token; exact match compares the parsed
JSON of greedy answers with the right action. Mean reward is valid JSON plus exact match, 0 to 2.
Rewards are given for plain commands, of which the start gets a third right: who samples learns only
from what is sampled. In brackets are 95 % bootstrap intervals. One base, one data set, one seed and
short trainings: overlapping intervals are no order."""

AGAIN = """## Again

```sh
python examples/alignment/run.py
python docs/alignment_page.py .graft/alignment/alignment.json
```

With `--search` the objectives and their settings are searched together, too."""


def page(record: dict[str, Any]) -> str:
    """The whole page."""
    about = f"Base: `{record['base']}`. Machine: {record['machine']}."
    return "\n\n".join([HEAD, about, table(record["rows"]), HOW, AGAIN]) + "\n"


def table(rows: list[dict[str, Any]]) -> str:
    """One line a row, as Markdown."""
    heads = ["objective", "measured on", "steps", "seconds", *COLUMNS, "mean reward"]
    lines = [heads, ["---", "---", *["---:"] * (len(heads) - 2)], *map(_cells, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(row: dict[str, Any]) -> list[str]:
    metrics = row["metrics"]
    reward = "—"
    if all(name in metrics for name in REWARDS):
        reward = f"{sum(metrics[name]['value'] for name in REWARDS):.3f}"
    facts = [f"{row[key]:.0f}" if key in row else "—" for key in ("steps", "seconds")]
    values = (_value(metrics.get(key)) for key in COLUMNS.values())
    return [row["name"], row["rows"], *facts, *values, reward]


def _value(metric: dict[str, float] | None) -> str:
    if metric is None:
        return "—"
    return f"{metric['value']:.3f} [{metric['low']:.3f}, {metric['high']:.3f}]"


def main() -> None:
    """Copies a record here if one is named, and writes the document."""
    if len(sys.argv) > 1:
        shutil.copyfile(sys.argv[1], RECORD)
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    PAGE.write_text(page(record), encoding="utf-8")


if __name__ == "__main__":
    main()
