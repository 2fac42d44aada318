"""Writes `comparison.md` from a comparison's record: `python docs/comparison_page.py [RECORD]`.

RECORD is the `comparison.json` that `graft compare` wrote; it and the page beside it are copied to
`docs/`, so that the published figures are the measured ones. Without it the copy is read again.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from graft.report import Comparison
from graft.report.comparison import explanation
from graft.report.comparison_table import markdown_table
from graft.report.words import duration_words

DOCS = Path(__file__).parent
RECORD, REPORT, PAGE = (DOCS / f"comparison.{kind}" for kind in ("json", "html", "md"))

HEAD = """# The methods compared

Written by `python docs/comparison_page.py` from `comparison.json`, which `graft compare` measured;
a test keeps it fresh. The full report with its plots is [comparison.html](comparison.html)."""


def page(comparison: Comparison) -> str:
    """The whole page."""
    best = ", ".join(comparison.front) or "none"
    how = (
        "```sh\ngraft compare examples/smart_home/compare.yaml --methods all\n"
        "python docs/comparison_page.py .graft/comparisons/smart-home-methods/comparison.json\n```"
    )
    parts = [
        HEAD,
        f"Base: `{comparison.base}`. Machine: {comparison.machine}. "
        f"Training time of all points and seeds: {duration_words(comparison.seconds)}. "
        f"{comparison.created_at}.",
        markdown_table(comparison),
        f"On the front (no other method is better in {comparison.quality}, memory and size at "
        f"once): {best}.",
        "## How it was measured",
        explanation(comparison),
        "One base, one data set and short trainings: the order of methods is that of this setting. "
        "Overlapping intervals are no order at all. Methods trained one after another on a shared "
        "machine, so tokens/s and seconds are rough; [benchmarks.md](benchmarks.md) has methods "
        "race PEFT in turns.",
        "## Again",
        how,
    ]
    return "\n\n".join(parts) + "\n"


def without_folders(text: str, home: Path) -> str:
    """Takes out where the machine that measured keeps its home and this project."""
    return re.sub(r"/[^\s\"\\]*/(?=examples/)", "", text.replace(str(home), ".graft"))


def main() -> None:
    """Copies a record and its page here if one is named, and writes the document."""
    if len(sys.argv) > 1:
        given = Path(sys.argv[1])
        home = Comparison.model_validate_json(given.read_text()).folder
        for source, copy in ((given, RECORD), (given.with_suffix(".html"), REPORT)):
            copy.write_text(without_folders(source.read_text(), Path(home).parents[1]))
    comparison = Comparison.model_validate_json(RECORD.read_text(encoding="utf-8"))
    PAGE.write_text(page(comparison), encoding="utf-8")


if __name__ == "__main__":
    main()
