"""Objectives against TRL's trainers with the same PEFT adapter: steps a second, and peak memory.

    python -m benchmarks.objectives --json OUT [--quick]

Both sides of an objective run in a process of their own, hold the same base, start from the same
adapter and read the same pairs; they take turns, a few steps each. Before anything is timed their
losses must agree. Of TRL its trainer is measured with its own collation, reference and loss,
without the bookkeeping of transformers' loop around them: a plain loop steps it.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks._race import (
    LOSSES_AGREE,
    PlainLoop,
    Side,
    add_race_options,
    load_weights,
    peft_config,
    race,
    race_figures,
)
from benchmarks._result import write_result
from graft.recipe.sections import Recipe

if TYPE_CHECKING:
    from graft.data.records import TokenRow
    from graft.engine.run import LoadedRun

DATA = Path(__file__).parents[1] / "examples" / "alignment" / "data"


class Ours:
    """GRAFT's trainer with one slot; writes the adapter that it starts from."""

    def __init__(self, run: LoadedRun, start: Path) -> None:
        from graft.compressors.base import Adapter
        from graft.compressors.folder import save_adapter
        from graft.engine.train import Trainer

        self._trainer = Trainer(run.model)
        self._trainer.join("own", run.recipe, run.prepared.train)
        save_adapter(start, Adapter(run.recipe.method, run.model.tensors("own")), "base")

    def step(self) -> float:
        """One step of the slot."""
        return self._trainer.step()["own"].loss


class TrlDpo:
    """TRL's DPO trainer; its reference is the base with the adapter switched off, as ours is."""

    def __init__(self, run: LoadedRun, start: Path) -> None:
        import datasets
        from trl.trainer.dpo_config import DPOConfig
        from trl.trainer.dpo_trainer import DPOTrainer

        recipe = run.recipe
        settings = recipe.objective.model_dump()
        args = DPOConfig(
            output_dir=str(start.parent / "trl"),
            per_device_train_batch_size=recipe.train.batch_size,
            beta=settings["beta"],
            loss_type=[settings["loss_type"]],
            max_length=None,
            use_cpu=True,
            bf16=False,  # the base is in its own dtype already
            gradient_checkpointing=False,  # ours has none either
            report_to=[],
        )
        pair = {"prompt": ["asked"], "chosen": ["yes"], "rejected": ["no"]}
        self._trainer: Any = DPOTrainer(
            model=run.model.base,
            args=args,
            train_dataset=datasets.Dataset.from_dict(pair),  # it takes none; rows come tokenized
            processing_class=run.template.tokenizer,
            peft_config=peft_config(start),
        )
        load_weights(self._trainer.model, start)
        self._trainer.model.train()
        self._rows = [_as_trl(row) for row in run.prepared.train]
        trained = [p for p in self._trainer.model.parameters() if p.requires_grad]
        self._loop = PlainLoop(trained, recipe.train, len(self._rows))

    def step(self) -> float:
        """One step on the pairs that our trainer takes."""
        batch = self._trainer.data_collator([self._rows[at] for at in self._loop.begin()])
        return self._loop.update(self._trainer.compute_loss(self._trainer.model, dict(batch)))


def _as_trl(row: TokenRow) -> dict[str, list[int]]:
    parts: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for token, number in zip(row.input_ids, row.branch or [], strict=True):
        parts[number].append(token)
    return dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), parts.values(), strict=True))


class Contest(NamedTuple):
    """An objective, who does it on TRL, and whether both must come to the same losses."""

    objective: dict[str, Any]
    rival: Callable[[LoadedRun, Path], Side]
    has_equal_losses: bool = True
    """Sampled answers differ between the two, and so do losses on them."""


CONTESTS = {"dpo": Contest({"type": "dpo", "beta": 0.1}, TrlDpo)}


def build(kind: Callable[[LoadedRun, Path], Side], content: dict[str, Any], start: str) -> Side:
    """Makes a side in its own process."""
    from graft.engine.run import load_run

    home = Path(content["home"])
    return kind(load_run(Recipe.model_validate(content["recipe"]), home), Path(start))


def race_objective(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Runs one objective's two sides in turns."""
    contest = CONTESTS[name]
    tolerance = LOSSES_AGREE[options.dtype] if contest.has_equal_losses else None
    content = {"recipe": recipe_of(contest.objective, options), "home": str(options.home)}
    with tempfile.TemporaryDirectory(prefix="graft-benchmark-") as scratch:
        given = (content, str(Path(scratch) / "start"))
        # Ours writes what theirs starts from.
        sides = {
            "ours": partial(build, Ours, *given),
            "theirs": partial(build, contest.rival, *given),
        }
        return {"objective": name, **race(name, sides, options, tolerance=tolerance)}


def recipe_of(objective: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """What both sides train."""
    return {
        "model": {"source": options.model, "dtype": options.dtype, "device": "cpu"},
        "data": {"train": str(DATA / "train.jsonl"), "format": "preference", "max_length": 256},
        "method": {"type": "lora", "r": 16},
        "objective": objective,
        # Full speed from the first step, so that the losses compared leave ln 2.
        "train": {
            "batch_size": options.batch_size,
            "lr": 1e-3,
            "schedule": "constant",
            "warmup_fraction": 0.0,
        },
    }


def figures_of(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """Speeds and memory of all objectives."""
    figures: dict[str, float] = {}
    for row in rounds:
        figures |= race_figures(row["objective"], row, "trl")
    return figures


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_race_options(parser)
    parser.add_argument("--objectives", default=",".join(CONTESTS), help="some of them")
    parser.add_argument("--quick", action="store_true", help="two rounds of one step")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.steps = 2, 1
    rounds: list[dict[str, Any]] = []
    for name in options.objectives.split(","):
        rounds.append(race_objective(name, options))
        print({k: round(v, 3) for k, v in figures_of(rounds[-1:]).items()}, flush=True)
        write_result(options.json, figures_of(rounds), rounds, options.threads, vars(options))


if __name__ == "__main__":
    main()
