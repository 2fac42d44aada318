"""Trains the start and each objective on it, and measures them on the same held-out rows.

    python examples/alignment/run.py [--home FOLDER] [--search] [--set A.B=C]

The figures land in `alignment.json` in the home, and `docs/alignment_page.py` makes a page of them.
What is done already is not done again, so an interrupted run goes on with the same command.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft.core.process import prepare_process

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from graft.artifacts import MetricValue
    from graft.core.progress import Progress
    from graft.recipe.sections import Recipe
    from graft.recipe.space import RecipeSpace

FOLDER = Path(__file__).resolve().parent
OBJECTIVES = ("dpo", "orpo", "kto", "grpo", "ppo")
"""In the table's order; those whose recipe lies in this folder are trained."""
MEASURES = {"pairs": "dpo", "commands": "grpo"}
"""Held-out rows → the recipe whose data and metrics are those; both measure base and start."""


def recipes() -> dict[str, Path]:
    """The objectives' recipes that are here."""
    paths = {name: FOLDER / f"{name}.yaml" for name in OBJECTIVES}
    return {name: path for name, path in paths.items() if path.exists()}


class Measurement:
    """Trains and measures, and keeps the record.

    Args:
        home: Holds runs, adapters and the record.
        overrides: Of every recipe, as `--set` takes them.
        progress: Told of every step.
    """

    def __init__(self, home: Path, overrides: Sequence[str], progress: Progress) -> None:
        self._home, self._overrides, self._progress = home, list(overrides), progress
        self._start: str | None = None
        self.rows: list[dict[str, Any]] = []

    def measure_start(self) -> None:
        """Measures the bare base and the half-trained start, on pairs and on plain commands."""
        from graft.pipelines.train import train

        start = train(self._space(FOLDER / "sft.yaml"), home=self._home, progress=self._progress)
        self._start = start.artifact
        facts = {"steps": start.steps, "seconds": start.seconds}
        for rows, measure in MEASURES.items():
            recipe = self._space(FOLDER / f"{measure}.yaml").recipe()
            self._evaluate("base", "base", recipe, rows=rows)
            self._evaluate("start", start.artifact, recipe, rows=rows, **facts)

    def train_objective(self, name: str, path: Path) -> None:
        """Trains one objective from the start."""
        from graft.pipelines.train import train

        space = self._space(path)
        done = train(space, home=self._home, progress=self._progress)
        rows = "pairs" if space.sections().data.format == "preference" else "commands"
        self._add(name, done.metrics, rows=rows, steps=done.steps, seconds=done.seconds)

    def search(self) -> None:
        """Searches objective and settings together; the best trial's adapter is a row."""
        from graft.pipelines.tune import tune
        from graft.runtime.session import ray_session

        space = self._space(FOLDER / "search.yaml")
        with ray_session():
            tuned = tune(space, home=self._home, progress=self._progress)
        best = space.fix(tuned.best.params)
        name = f"search ({len(tuned.trials)} trials): {best.objective.type}"
        self._add(name, tuned.metrics, rows="pairs", steps=tuned.best.steps, seconds=tuned.seconds)

    def _space(self, path: Path) -> RecipeSpace:
        from graft.recipe.load import load_recipe

        # The adapter that this run trained, whatever else was registered under the start's name.
        begin = [f'train.init_from="{self._start}"'] if self._start else []
        return load_recipe(path, [*self._overrides, *begin])

    def _evaluate(self, name: str, reference: str, recipe: Recipe, **facts: float | str) -> None:
        from graft.core.files import sha256_json, write_atomic
        from graft.pipelines.evaluate import EvalResult, evaluate_reference

        key = sha256_json([reference, recipe.model_dump(mode="json")])[:16]
        file = self._home / "alignment" / f"{name}-{key}.json"
        if file.exists():
            result = EvalResult.model_validate_json(file.read_text())
        else:
            result = evaluate_reference(reference, recipe, home=self._home, progress=self._progress)
            write_atomic(file, result.model_dump_json())
        self._add(name, result.metrics, **facts)

    def _add(self, name: str, metrics: Mapping[str, MetricValue], **facts: float | str) -> None:
        from graft.core.files import write_json

        measured = {key: value.model_dump(mode="json") for key, value in metrics.items()}
        self.rows.append({"name": name, **facts, "metrics": measured})
        write_json(
            self._home / "alignment.json",
            {
                "base": self._space(FOLDER / "sft.yaml").sections().model.source,
                "machine": f"{os.cpu_count()} cores of {platform.machine()}",
                "rows": self.rows,
            },
        )
        values = {key: round(value.value, 3) for key, value in metrics.items()}
        print(name, json.dumps(values), flush=True)


def main() -> None:
    """Parses the command line and runs everything, one after another."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--home", type=Path, default=Path(".graft/alignment"))
    parser.add_argument("--search", action="store_true", help="search.yaml too; takes Ray")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="A.B=C")
    arguments = parser.parse_args()
    prepare_process()
    from graft.cli.progress import terminal_progress

    home = arguments.home.resolve()
    home.mkdir(parents=True, exist_ok=True)
    measurement = Measurement(home, arguments.overrides, terminal_progress())
    measurement.measure_start()
    for name, path in recipes().items():
        measurement.train_objective(name, path)
    if arguments.search:
        measurement.search()


if __name__ == "__main__":
    main()
