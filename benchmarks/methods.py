"""Each tuning method against PEFT and a plain training loop: steps a second, and peak memory.

    python -m benchmarks.methods --json OUT [--quick]

Both sides of a method run in a process of their own, hold the same base, start from the same
weights and read the same rows; they take turns, a few steps each, so that a busy machine is busy
for both. Before anything is timed their losses must agree. The plain loop is what anybody would
write: transformers' forward pass with labels, PEFT's model, torch's fused AdamW, one clip.

`qlora` and `qdora` are LoRA and DoRA on an NF4 base, on both sides the same one. `peft` is VeRA of
PEFT on both sides: what our loop around it costs. What PEFT has not stands in the plain loop alone,
and its figures are `NAME_speed_vs_plain`: `full` trains all weights, `half` those that ours picks
in a round, and `bottleneck`, `memory` and `mixture` are modules written by hand (`_plain_layers`).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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
from graft.methods._own_weights import OwnWeightsMethod
from graft.methods.half import HalfMethod
from graft.methods.ptuning import PtuningMethod
from graft.methods.virtual import SITE
from graft.recipe.sections import Recipe

if TYPE_CHECKING:
    import torch

    from graft.methods.base import AdapterTensors, Method

DATA = Path(__file__).parents[1] / "examples" / "smart_home" / "data"
OWN_TENSORS = "own.safetensors"


class Raced(NamedTuple):
    """One race."""

    method: dict[str, Any]
    quantization: str = "none"


LORA, DORA = {"type": "lora", "r": 16}, {"type": "dora", "r": 16}
METHODS: dict[str, Raced] = {
    "lora": Raced(LORA),
    "ia3": Raced({"type": "ia3"}),
    "dora": Raced(DORA),
    "qlora": Raced(LORA, "nf4"),
    "qdora": Raced(DORA, "nf4"),
    # Both sides cut ranks from the first step on; both add the same penalty, too small to be seen.
    "adalora": Raced({"type": "adalora", "tinit": 0, "tfinal": 0, "orth_reg_weight": 1e-9}),
    "prompt": Raced({"type": "prompt"}),
    "prefix": Raced({"type": "prefix"}),
    "ptuning": Raced({"type": "ptuning"}),
    "peft": Raced({"type": "peft", "peft_type": "VERA"}),
    "full": Raced({"type": "full"}),
    "half": Raced({"type": "half"}),
    "bottleneck": Raced({"type": "bottleneck"}),
    "memory": Raced({"type": "memory"}),
    "mixture": Raced({"type": "mixture"}),
}


class Ours:
    """GRAFT's trainer with one slot; writes the weights that theirs starts from."""

    def __init__(self, recipe: Recipe, home: Path, start: Path) -> None:
        from graft.engine.run import load_run
        from graft.engine.train import Trainer

        self._run = load_run(recipe, home)
        self._trainer = Trainer(self._run.model)
        self._trainer.join("own", recipe, self._run.prepared.train)
        if not isinstance(recipe.method, OwnWeightsMethod):  # which starts from the base itself
            save_start(start, recipe.method, self._run.model.tensors("own"))

    def step(self) -> float:
        """One step of the slot."""
        return self._trainer.step()["own"].loss


class Theirs:
    """PEFT and a plain loop, or the loop alone; weights of a bf16 base train in fp32, autocast."""

    def __init__(self, recipe: Recipe, home: Path, start: Path) -> None:
        from graft.engine.run import load_run

        run = load_run(recipe, home)
        self._recipe, self._rows = recipe, run.prepared.train
        is_whole = isinstance(recipe.method, OwnWeightsMethod)
        self._is_mixed = is_whole and recipe.model.dtype == "bf16"
        base = run.model.base.float() if self._is_mixed else run.model.base
        self._model = base.requires_grad_(True) if is_whole else _adapted(base, recipe, start)
        self._model.train()
        self._trained = {n: p for n, p in self._model.named_parameters() if p.requires_grad}
        self._loop = PlainLoop(list(self._trained.values()), recipe.train, len(self._rows))

    def step(self) -> float:
        """One step of the loop, on the rows that our trainer takes."""
        import torch

        rows = [self._rows[at] for at in self._loop.begin()]
        self._freeze_a_half()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self._is_mixed):
            loss = self._model(**padded(rows)).loss
        found = self._loop.update(loss)
        if self._recipe.method.type == "adalora":
            self._model.base_model.update_and_allocate(self._loop.step - 1)
        return found

    def _freeze_a_half(self) -> None:
        method = self._recipe.method
        if not isinstance(method, HalfMethod):
            return
        names, seed = list(self._trained), self._recipe.train.seed
        chosen = method.trained_at(names, self._loop.step, seed)
        for name, parameter in self._trained.items():
            parameter.requires_grad_(name in chosen)


def _adapted(base: Any, recipe: Recipe, start: Path) -> Any:
    """The base with the adapter on it that our side starts from: PEFT's, or one by hand."""
    from peft import get_peft_model

    from benchmarks._plain_layers import put_on

    if not recipe.method.is_read_by_peft:
        return put_on(base, recipe.method, _own_tensors(start))
    settings: dict[str, Any] = {}
    if recipe.method.type == "adalora":
        settings["total_step"] = recipe.train.steps
    model = get_peft_model(base, peft_config(start, **settings))
    if isinstance(recipe.method, PtuningMethod):
        _load_encoder(model, _own_tensors(start)[SITE])
    else:
        load_weights(model, start)
    return model


def _load_encoder(model: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Gives PEFT's prompt encoder its weights: files of this method hold what it puts out alone."""
    import torch

    with torch.no_grad():
        for name, parameter in model.prompt_encoder["default"].named_parameters():
            is_embedding = name == "embedding.weight"
            parameter.copy_(tensors["embedding" if is_embedding else name.replace(".", "_")])


def save_start(folder: Path, method: Method, tensors: AdapterTensors) -> None:
    """Writes an adapter as it is published, and what it trains beside."""
    from safetensors.torch import save_file

    from graft.compressors.base import Adapter
    from graft.compressors.folder import save_adapter

    save_adapter(folder, Adapter(method, tensors), "base")
    named = {
        f"{site}.{key}": t.contiguous() for site, of in tensors.items() for key, t in of.items()
    }
    save_file(named, folder / OWN_TENSORS)


def _own_tensors(folder: Path) -> AdapterTensors:
    from safetensors.torch import load_file

    from graft.methods.base import by_site

    return by_site(load_file(folder / OWN_TENSORS))


def build(kind: type[Ours] | type[Theirs], content: dict[str, Any], home: str, start: str) -> Side:
    """Makes a side in its own process."""
    return kind(Recipe.model_validate(content), Path(home), Path(start))


def race_method(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Runs one method's two sides in turns."""
    content = recipe_of(METHODS[name], options)
    with tempfile.TemporaryDirectory(prefix="graft-benchmark-") as scratch:
        given = (content, str(options.home), str(Path(scratch) / "start"))
        # Ours writes what theirs starts from.
        sides = {"ours": partial(build, Ours, *given), "theirs": partial(build, Theirs, *given)}
        found = race(name, sides, options, tolerance=LOSSES_AGREE[options.dtype])
    return {"method": name, "rival": rival_of(content), **found}


def rival_of(content: dict[str, Any]) -> str:
    """Whose figure it is: PEFT's, or the plain loop's where PEFT has no part in it."""
    return "peft" if Recipe.model_validate(content).method.is_read_by_peft else "plain"


def recipe_of(raced: Raced, options: argparse.Namespace) -> dict[str, Any]:
    """What both sides train."""
    quantization = {"type": raced.quantization}
    return {
        "model": {
            "source": options.model,
            "dtype": options.dtype,
            "device": "cpu",
            "quantization": quantization,
        },
        "data": {"train": str(DATA / "train.jsonl"), "max_length": 256},
        "method": raced.method,
        # AdaLoRA's schedule wants room; no race comes near the end.
        "train": {"steps": 4000, "batch_size": options.batch_size, "lr": 2e-4},
    }


def figures_of(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """Speeds and memory of all methods."""
    figures: dict[str, float] = {}
    for row in rounds:
        figures |= race_figures(row["method"], row, row["rival"])
    return figures


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_race_options(parser)
    parser.add_argument("--methods", default=",".join(METHODS), help="some of them")
    parser.add_argument("--quick", action="store_true", help="two methods, two rounds")
    options = parser.parse_args()
    names = options.methods.split(",")
    if unknown := [name for name in names if name not in METHODS]:
        parser.error(f"no method is called {', '.join(unknown)}; known: {', '.join(METHODS)}")
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
