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
    return "\n\n".join([f"## {name}", what, table(record["figures"]), f"Taken on {taken}.", again])


def table(figures: dict[str, float]) -> str:
    """One line a figure, with its spread where it was measured, as Markdown."""
    names = [name for name in figures if not name.endswith(SPREAD)]
    lines = [["figure", "value", "worst", "best"], ["---", "---:", "---:", "---:"]]
    for name in names:
        spread = [figures.get(f"{name}_{end}") for end in SPREAD]
        lines.append([f"`{name}`", *map(_cell, [figures[name], *spread])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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
