"""Writes `benchmarks.md` from measured figures: `python docs/benchmarks_page.py [RECORD ...]`.

Each RECORD is `NAME.json`, which `python -m benchmarks.NAME --json NAME.json` wrote; it is copied
to `docs/benchmarks/`, so that the published figures are the measured ones. Records that are there
already stay on the page.
"""

from __future__ import annotations

import ast
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
RECORDS, PAGE = DOCS / "benchmarks", DOCS / "benchmarks.md"
MODULES = DOCS.parent / "benchmarks"
SPREAD = ("worst", "best")

HEAD = """# Benchmarks

Written by `python docs/benchmarks_page.py` from the records in `docs/benchmarks/`, each of which a
benchmark measured: `make bench`, or one by itself as below.

Arms run beside each other on the same rows from the same start, taking turns; where they compute
the same thing, only after their losses were found equal. Speeds and makespans say how many times as
fast as the rival, memory which share of the rival's peak: above 1 is better for the first two,
below 1 for the last. A figure is the median over the rounds, between the worst round and the best.
Tokens a second and products a second say more of the machine than of a program. Errors of predicted
memory are shares of what was measured. All rounds are in the records."""


def page(records: dict[str, dict[str, Any]]) -> str:
    """The whole page; record by benchmark."""
    return "\n\n".join([HEAD, *(section(name, records[name]) for name in sorted(records))]) + "\n"


def section(name: str, record: dict[str, Any]) -> str:
    """One benchmark: what it is, its figures, and where they were taken."""
    source = (MODULES / f"{name}.py").read_text(encoding="utf-8")
    what = (ast.get_docstring(ast.parse(source)) or "").partition("\n\n")[0].replace("\n", " ")
    machine, versions = record["machine"], record["versions"]
    taken = (
        f"{machine['cores']} cores of {machine['cpu']}, {machine['threads']} threads; "
        + ", ".join(f"{tool} {version}" for tool, version in versions.items())
    )
    again = f"```sh\npython -m benchmarks.{name} --json {name}.json\n```"
    figures = TABLES[name](record) if name in TABLES else table(record["figures"])
    return "\n\n".join([f"## {name}", what, figures, f"Taken on {taken}.", again])


def table(figures: dict[str, float]) -> str:
    """One line a figure, with its spread where it was measured, as Markdown."""
    names = [name for name in figures if not name.endswith(SPREAD)]
    lines = []
    for name in names:
        spread = [figures.get(f"{name}_{end}") for end in SPREAD]
        lines.append([f"`{name}`", *map(_cell, [figures[name], *spread])])
    return _markdown(["figure", "value", "worst", "best"], lines)


def methods_table(record: dict[str, Any]) -> str:
    """One line a method: its race against PEFT, or against a plain loop by hand."""
    figures, lines = record["figures"], []
    for row in record["rounds"]:
        method, rival = row["method"], row["rival"]
        speed = f"{method}_speed_vs_{rival}"
        values = [figures[name] for name in (speed, *(f"{speed}_{end}" for end in SPREAD))]
        values.append(figures[f"{method}_memory_vs_{rival}"])
        lines.append([f"{method} vs {RIVALS[rival]}", *map(_cell, values)])
    return _markdown(["method", "speed", "worst", "best", "memory"], lines)


def memory_tuning_table(record: dict[str, Any]) -> str:
    """One line a contestant, the bare base first."""
    base, lines = record["rounds"][0]["general_perplexity"], []
    for row in record["rounds"]:
        perplexity = row["general_perplexity"]
        size = row["file_bytes"] / 1e6 if "file_bytes" in row else None
        values = [row["recall"], perplexity, perplexity / base, size]
        lines.append([row["name"], *map(_cell, values), str(row.get("steps", "—"))])
    heads = ["", "recall", "perplexity on general text", "against the base", "file, MB", "steps"]
    return _markdown(heads, lines)


RIVALS = {"peft": "PEFT", "plain": "a plain loop"}
TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "methods": methods_table,
    "memory_tuning": memory_tuning_table,
}
"""Of the benchmarks whose records say more in a table of their own."""


def _markdown(heads: list[str], lines: list[list[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [heads, rule, *lines])


def _cell(value: float | None) -> str:
    return "—" if value is None else f"{value:.3g}"


def main() -> None:
    """Copies the records that are named, and writes the document."""
    RECORDS.mkdir(exist_ok=True)
    for path in map(Path, sys.argv[1:]):
        if not (MODULES / path.name).with_suffix(".py").exists():
            sys.exit(f"{path}: there is no benchmark {path.stem!r}; name the file as the benchmark")
        shutil.copyfile(path, RECORDS / path.name)
    found = {path.stem: json.loads(path.read_text()) for path in RECORDS.glob("*.json")}
    PAGE.write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
