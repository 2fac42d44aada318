"""Objectives against TRL's trainers with the same PEFT adapter: steps a second, and peak memory.

    python -m benchmarks.objectives --json OUT [--quick]

Both sides of an objective run in a process of their own, hold the same base, start from the same
adapter and read the same prompts; they take turns, a few steps each. Before anything is timed their
losses must agree, unless they sample. Of TRL its trainer is measured with its own collation,
generation, reference and loss, without the bookkeeping of transformers' loop around them: a plain
loop steps it. TRL has no PPO: ours is held against our own supervised tuning, for its memory.
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
MAX_CHARS = 60
"""Sampled answers earn most up to here, so that those of a group differ."""


class Ours:
    """GRAFT's trainer with one slot; writes the adapter that it starts from."""

    def __init__(self, run: LoadedRun, start: Path) -> None:
        from graft.compressors.base import Adapter
        from graft.compressors.folder import save_adapter
        from graft.engine.train import Trainer

        self._trainer = Trainer(run.model, template=run.template)
        self._trainer.join("own", run.recipe, run.prepared.train)
        if not start.exists():  # where both sides are ours, either starts from the seed's weights
            save_adapter(start, Adapter(run.recipe.method, run.model.tensors("own")), "base")

    def step(self) -> float:
        """One step of the slot."""
        return self._trainer.step()["own"].loss


class TrlDpo:
    """TRL's DPO trainer; its reference is the base with the adapter switched off, as ours is."""

    def __init__(self, run: LoadedRun, start: Path) -> None:
        from trl.trainer.dpo_config import DPOConfig
        from trl.trainer.dpo_trainer import DPOTrainer

        settings = run.recipe.objective.model_dump()
        pair = {"prompt": ["asked"], "chosen": ["yes"], "rejected": ["no"]}
        self._trainer, self._loop = _trl(
            DPOTrainer,
            DPOConfig,
            run,
            start,
            pair,
            per_device_train_batch_size=run.recipe.train.batch_size,
            beta=settings["beta"],
            loss_type=[settings["loss_type"]],
            max_length=None,
        )
        self._rows = [_as_trl(row) for row in run.prepared.train]

    def step(self) -> float:
        """One step on the pairs that our trainer takes."""
        batch = self._trainer.data_collator([self._rows[at] for at in self._loop.begin()])
        return self._loop.update(self._trainer.compute_loss(self._trainer.model, dict(batch)))


class TrlGrpo:
    """TRL's GRPO trainer: samples with transformers' `generate`, then learns from the answers."""

    def __init__(self, run: LoadedRun, start: Path) -> None:
        from trl.trainer.grpo_config import GRPOConfig
        from trl.trainer.grpo_trainer import GRPOTrainer

        settings = run.recipe.objective.model_dump()
        self._group_size = settings["group_size"]
        self._trainer, self._loop = _trl(
            GRPOTrainer,
            GRPOConfig,
            run,
            start,
            {"prompt": ["asked"]},
            rewards={"reward_funcs": [_reward]},
            per_device_train_batch_size=run.recipe.train.batch_size * self._group_size,
            num_generations=self._group_size,
            max_completion_length=settings["max_new_tokens"],
            beta=settings["beta"],
            loss_type=settings["loss_type"],
            temperature=settings["temperature"],
        )
        self._trainer.current_gradient_accumulation_steps = 1
        decode = run.template.tokenizer.decode
        self._prompts = [
            decode(row.input_ids[: row.num_prompt_tokens]) for row in run.prepared.train
        ]

    def step(self) -> float:
        """Samples answers to the prompts that our trainer takes, and learns from them."""
        asked = [{"prompt": self._prompts[at]} for at in self._loop.begin()]
        answered = self._trainer._generate_and_score_completions(
            [row for row in asked for _ in range(self._group_size)]
        )
        return self._loop.update(self._trainer.compute_loss(self._trainer.model, answered))


def _reward(completions: list[str], **_: Any) -> list[float]:
    """What our `length` metric gives at `MAX_CHARS`."""
    lengths = [len(answer.strip()) for answer in completions]
    over = [max(0, length - MAX_CHARS) / MAX_CHARS for length in lengths]
    return [max(0.0, 1.0 - of) if length else 0.0 for length, of in zip(lengths, over, strict=True)]


def _trl(
    trainer: type,
    config: type,
    run: LoadedRun,
    start: Path,
    row: dict[str, Any],
    rewards: dict[str, Any] | None = None,
    **settings: Any,
) -> tuple[Any, PlainLoop]:
    """Makes a trainer that has our start, and the loop that steps it."""
    import datasets

    recipe = run.recipe
    made: Any = trainer(
        model=run.model.base,
        args=config(
            output_dir=str(start.parent / "trl"),
            use_cpu=True,
            bf16=False,  # the base is in its own dtype already
            gradient_checkpointing=False,  # ours has none either
            report_to=[],
            **settings,
        ),
        train_dataset=datasets.Dataset.from_dict(row),
        processing_class=run.template.tokenizer,
        peft_config=peft_config(start),
        **(rewards or {}),
    )
    load_weights(made.model, start)
    made.model.train()
    trained = [p for p in made.model.parameters() if p.requires_grad]
    return made, PlainLoop(trained, recipe.train, len(run.prepared.train))


def _as_trl(row: TokenRow) -> dict[str, list[int]]:
    parts: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for token, number in zip(row.input_ids, row.branch or [], strict=True):
        parts[number].append(token)
    return dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), parts.values(), strict=True))


class Contest(NamedTuple):
    """An objective, and what it is held against."""

    objective: dict[str, Any]
    theirs: Callable[[LoadedRun, Path], Side]
    rival: str = "trl"
    rows: tuple[str, str] = ("train.jsonl", "preference")
    """File and format of the data."""
    answers: int = 2
    """Each prompt has so many; as many are learned from in every contest."""
    their_objective: dict[str, Any] | None = None
    """None is the same."""
    has_equal_losses: bool = True
    """Sampled answers differ between the two, and so do losses on them."""


_LENGTH = [{"metric": {"type": "length", "max_chars": MAX_CHARS}}]
CONTESTS = {
    "dpo": Contest({"type": "dpo", "beta": 0.1}, TrlDpo),
    "grpo": Contest(
        {"type": "grpo", "group_size": 8, "max_new_tokens": 40, "max_kl": None, "rewards": _LENGTH},
        TrlGrpo,
        answers=8,
        has_equal_losses=False,
    ),
    "ppo": Contest(
        # Answers as long as those that supervised tuning is given.
        {"type": "ppo", "max_new_tokens": 18, "rewards": _LENGTH},
        Ours,
        rival="sft",
        rows=("sft.jsonl", "messages"),
        answers=1,
        their_objective={"type": "sft"},
        has_equal_losses=False,
    ),
}


def build(kind: Callable[[LoadedRun, Path], Side], content: dict[str, Any], start: str) -> Side:
    """Makes a side in its own process."""
    from graft.engine.run import load_run

    home = Path(content["home"])
    return kind(load_run(Recipe.model_validate(content["recipe"]), home), Path(start))


def race_objective(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Runs one objective's two sides in turns."""
    contest = CONTESTS[name]
    tolerance = LOSSES_AGREE[options.dtype] if contest.has_equal_losses else None
    with tempfile.TemporaryDirectory(prefix="graft-benchmark-") as scratch:

        def side(kind: Callable[[LoadedRun, Path], Side], objective: dict[str, Any]) -> Any:
            content = {"recipe": recipe_of(contest, objective, options), "home": str(options.home)}
            return partial(build, kind, content, str(Path(scratch) / "start"))

        # Ours writes what theirs starts from.
        sides = {
            "ours": side(Ours, contest.objective),
            "theirs": side(contest.theirs, contest.their_objective or contest.objective),
        }
        return {"objective": name, **race(name, sides, options, tolerance=tolerance)}


def recipe_of(
    contest: Contest, objective: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    """What a side trains."""
    file, format_ = contest.rows
    return {
        "model": {"source": options.model, "dtype": options.dtype, "device": "cpu"},
        "data": {"train": str(DATA / file), "format": format_, "max_length": 256},
        "method": {"type": "lora", "r": 16},
        "objective": objective,
        "train": {
            "batch_size": 2 * options.batch_size // contest.answers,
            # Where losses are compared they leave ln 2 at once; where answers are sampled they
            # stay as long on both sides as the start's are.
            "lr": 1e-3 if contest.has_equal_losses else 1e-7,
            "schedule": "constant",
            "warmup_fraction": 0.0,
        },
    }


def figures_of(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """Speeds and memory of all objectives; beside supervised tuning only memory is compared."""
    figures: dict[str, float] = {}
    for row in rounds:
        rival = CONTESTS[row["objective"]].rival
        found = race_figures(row["objective"], row, rival)
        figures |= {k: v for k, v in found.items() if rival == "trl" or "_memory_" in k}
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
