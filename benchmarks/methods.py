"""Each tuning method against PEFT and a plain training loop: steps a second, and peak memory.

    python -m benchmarks.methods --json OUT [--quick]

Both sides of a method run in a process of their own, hold the same base, start from the same
adapter and read the same rows; they take turns, a few steps each, so that a busy machine is busy
for both. Before anything is timed their losses must agree. The plain loop is what anybody would
write: transformers' forward pass with labels, PEFT's model, torch's fused AdamW, one clip.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks._race import (
    LOSSES_AGREE,
    PlainLoop,
    Side,
    add_race_options,
    load_weights,
    padded,
    peft_config,
    race,
    race_figures,
)
from benchmarks._result import write_result
from graft.recipe.sections import Recipe

DATA = Path(__file__).parents[1] / "examples" / "smart_home" / "data"
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"type": "lora", "r": 16},
    "dora": {"type": "dora", "r": 16},
    # Both sides cut ranks from the first step on; both add the same penalty, too small to be seen.
    "adalora": {"type": "adalora", "tinit": 0, "tfinal": 0, "orth_reg_weight": 1e-9},
    "ia3": {"type": "ia3"},
    "prompt": {"type": "prompt"},
    "prefix": {"type": "prefix"},
    "ptuning": {"type": "ptuning"},
    "full": {"type": "full"},
}


LOSSES_DIFFER = {"ptuning"}
"""Each side draws an encoder of its own."""


class Ours:
    """GRAFT's trainer with one slot."""

    def __init__(self, recipe: Recipe, home: Path, start: Path) -> None:
        from graft.compressors.base import Adapter
        from graft.compressors.folder import save_adapter
        from graft.engine.run import load_run
        from graft.engine.train import Trainer

        self._run = load_run(recipe, home)
        self._trainer = Trainer(self._run.model)
        self._trainer.join("own", recipe, self._run.prepared.train)
        if recipe.method.type != "full":
            save_adapter(start, Adapter(recipe.method, self._run.model.tensors("own")), "base")

    def step(self) -> float:
        """One step of the slot."""
        return self._trainer.step()["own"].loss


class Theirs:
    """PEFT and a plain loop; for `full` the loop alone, with fp32 weights under autocast."""

    def __init__(self, recipe: Recipe, home: Path, start: Path) -> None:
        from graft.engine.run import load_run

        run = load_run(recipe, home)
        self._recipe, self._rows = recipe, run.prepared.train
        base = run.model.base
        self._is_mixed = recipe.method.type == "full" and recipe.model.dtype == "bf16"
        if recipe.method.type == "full":
            self._model: Any = base.float() if self._is_mixed else base
            self._model.requires_grad_(True)
        else:
            self._model = _with_peft(base, recipe, start)
        self._model.train()
        trained = [p for p in self._model.parameters() if p.requires_grad]
        self._loop = PlainLoop(trained, recipe.train, len(self._rows))

    def step(self) -> float:
        """One step of the loop, on the rows that our trainer takes."""
        import torch

        rows = [self._rows[at] for at in self._loop.begin()]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self._is_mixed):
            loss = self._model(**padded(rows)).loss
        found = self._loop.update(loss)
        if self._recipe.method.type == "adalora":
            self._model.base_model.update_and_allocate(self._loop.step - 1)
        return found


def _with_peft(base: Any, recipe: Recipe, start: Path) -> Any:
    """PEFT's model on the base, at the weights that our side starts from."""
    from peft import PromptEncoderConfig, get_peft_model

    if recipe.method.type == "ptuning":
        # Files of this method hold what its encoder put out; training needs the encoder itself.
        config = PromptEncoderConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=recipe.method.model_dump()["num_virtual_tokens"],
            encoder_hidden_size=base.config.hidden_size,
        )
        return get_peft_model(base, config)
    schedule = {"total_step": recipe.train.steps} if recipe.method.type == "adalora" else {}
    model = get_peft_model(base, peft_config(start, **schedule))
    load_weights(model, start)
    return model


def build(kind: type[Ours] | type[Theirs], content: dict[str, Any], home: str, start: str) -> Side:
    """Makes a side in its own process."""
    return kind(Recipe.model_validate(content), Path(home), Path(start))


def race_method(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Runs one method's two sides in turns."""
    content = recipe_of(METHODS[name], options)
    tolerance = None if name in LOSSES_DIFFER else LOSSES_AGREE[options.dtype]
    with tempfile.TemporaryDirectory(prefix="graft-benchmark-") as scratch:
        given = (content, str(options.home), str(Path(scratch) / "start"))
        # Ours writes what theirs starts from.
        sides = {"ours": partial(build, Ours, *given), "theirs": partial(build, Theirs, *given)}
        return {"method": name, **race(name, sides, options, tolerance=tolerance)}


def recipe_of(method: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """What both sides train."""
    return {
        "model": {"source": options.model, "dtype": options.dtype, "device": "cpu"},
        "data": {"train": str(DATA / "train.jsonl"), "max_length": 256},
        "method": method,
        # AdaLoRA's schedule wants room; no race comes near the end.
        "train": {"steps": 4000, "batch_size": options.batch_size, "lr": 2e-4},
    }


def figures_of(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """Speeds and memory of all methods."""
    figures: dict[str, float] = {}
    for row in rounds:
        figures |= race_figures(row["method"], row, "peft")
    return figures


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_race_options(parser)
    parser.add_argument("--methods", default=",".join(METHODS), help="some of them")
    parser.add_argument("--quick", action="store_true", help="two methods, two rounds")
    options = parser.parse_args()
    names = options.methods.split(",")
    if options.quick:
        names, options.rounds, options.steps = names[:2], 2, 1
    rounds: list[dict[str, Any]] = []
    for name in names:
        rounds.append(race_method(name, options))
        of_name = {k: round(v, 3) for k, v in figures_of(rounds[-1:]).items()}
        print(of_name, flush=True)
        write_result(options.json, figures_of(rounds), rounds, options.threads, vars(options))


if __name__ == "__main__":
    main()
