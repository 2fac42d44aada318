"""One LoRA run on conversations of uneven length: tokens a second and memory, against TRL and PEFT.

    python -m benchmarks.finetune --json OUT [--quick]

Every arm is a process of its own with the same base, the same adapter to start from and the same
rows a step; arms take turns, an epoch each, forwards in one round and backwards in the next. Before
anything is timed their losses must agree; at the end each is judged on rows that none has learned.

Rows are cuts of the smart-home conversations, their lengths drawn from a log-normal distribution
(mean 96, longest 512); the first 60 % of each are its masked prompt. Rivals take a step's 8 rows in
two forward passes of 4 (`--rows-per-pass`); `trl` is the collation and the loss of TRL's SFT
trainer without the bookkeeping of transformers' loop, `peft` a loop written by hand. Both have rows
of like length in one pass. Ours divides rows as it does for everybody.

With `--upper-layers N` all adapt only the last N decoder layers, and a fourth arm, `ours_whole`, is
ours without what it keeps of the layers below. In the first round most rows are new, later none is.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks._race import (
    LOSSES_AGREE,
    PlainLoop,
    Side,
    add_race_options,
    load_weights,
    padded,
    peft_config,
    race,
)
from benchmarks._result import write_result
from graft.data.records import TokenRow
from graft.methods.lora import LoraMethod
from graft.recipe.sections import Recipe

if TYPE_CHECKING:
    from graft.engine.run import LoadedRun

DATA = Path(__file__).parents[1] / "examples" / "smart_home" / "data"
STEPS = 12
"""Of an epoch."""
NUM_HELD_OUT = 48
MEAN_LENGTH, MAX_LENGTH, SIGMA = 96, 512, 0.9
MASKED = 0.6


def uneven_rows(stream: Sequence[int], number: int, seed: int) -> list[TokenRow]:
    """Cuts a stream of tokens into rows of log-normal length whose prompts are masked."""
    draw = random.Random(seed)
    rows: list[TokenRow] = []
    for index in range(number):
        drawn = draw.lognormvariate(math.log(MEAN_LENGTH) - SIGMA**2 / 2, SIGMA)
        length = min(MAX_LENGTH, max(8, round(drawn)))
        start = draw.randrange(len(stream) - length)
        masked = round(MASKED * length)
        ids = list(stream[start : start + length])
        rows.append(TokenRow(ids, [at >= masked for at in range(length)], f"row {index}"))
    return rows


def rows_of(run: LoadedRun, batch_size: int) -> tuple[list[TokenRow], list[TokenRow]]:
    """Rows to learn from, and those that are held out."""
    rows = run.prepared.train
    learned, held_out = rows[: len(rows) * 4 // 5], rows[len(rows) * 4 // 5 :]
    streams = [[token for row in part for token in row.input_ids] for part in (learned, held_out)]
    return (
        uneven_rows(streams[0], STEPS * batch_size, seed=1),
        uneven_rows(streams[1], NUM_HELD_OUT, seed=2),
    )


class Ours:
    """GRAFT's trainer with one slot.

    Args:
        run: What it trains.
        start: Where it writes the adapter that all start from; None writes none.
        keeps_lower_states: As `Trainer` takes it.
    """

    def __init__(
        self, run: LoadedRun, start: Path | None, *, keeps_lower_states: bool = True
    ) -> None:
        from graft.compressors.base import Adapter
        from graft.compressors.folder import save_adapter
        from graft.engine.train import Trainer

        rows, self._held_out = rows_of(run, run.recipe.train.batch_size)
        self._model = run.model
        self._trainer = Trainer(run.model, keeps_lower_states=keeps_lower_states)
        self._trainer.join("own", run.recipe, rows)
        if start is not None:
            own = Adapter(run.recipe.method, run.model.tensors("own"))
            save_adapter(start, own, "base")

    def step(self) -> float:
        """One step of the slot."""
        return self._trainer.step()["own"].loss

    def held_out_loss(self) -> float:
        """Mean over supervised tokens."""
        from graft.engine.evaluate import row_losses

        sums, counts = zip(*row_losses(self._model, "own", self._held_out), strict=True)
        return float(sum(sums) / sum(counts))


class Peft:
    """A loop that anybody would write: PEFT's model, rows of like length in one forward pass."""

    def __init__(self, run: LoadedRun, start: Path, *, rows_per_pass: int) -> None:
        self._rows, self._held_out = rows_of(run, run.recipe.train.batch_size)
        self._rows_per_pass = rows_per_pass
        self._model = self._load(run, start)
        self._model.train()
        trained = [p for p in self._model.parameters() if p.requires_grad]
        self._loop = PlainLoop(trained, run.recipe.train, len(self._rows))

    def step(self) -> float:
        """One step on the rows that our trainer takes."""
        rows = sorted((self._rows[at] for at in self._loop.begin()), key=lambda r: len(r.input_ids))
        count = sum(_num_targets(row) for row in rows)
        losses = []
        for at in range(0, len(rows), self._rows_per_pass):
            loss = self._loss(rows[at : at + self._rows_per_pass], count)
            losses.append(float(loss.detach()))
            if at + self._rows_per_pass < len(rows):
                loss.backward()
        self._loop.update(loss)
        return sum(losses)

    def held_out_loss(self) -> float:
        """Mean over supervised tokens."""
        import torch

        self._model.eval()
        counts = [_num_targets(row) for row in self._held_out]
        with torch.no_grad():
            losses = [float(self._loss([row], sum(counts))) for row in self._held_out]
        return sum(losses)

    def _load(self, run: LoadedRun, start: Path) -> Any:
        from peft import get_peft_model

        model = get_peft_model(run.model.base, peft_config(start))
        load_weights(model, start)
        return model

    def _loss(self, rows: list[TokenRow], num_targets: int) -> Any:
        return self._model(**padded(rows), num_items_in_batch=num_targets, use_cache=False).loss


class Trl(Peft):
    """TRL's SFT trainer: its collation, its model and its loss."""

    def _load(self, run: LoadedRun, start: Path) -> Any:
        import datasets
        from trl.trainer.sft_config import SFTConfig
        from trl.trainer.sft_trainer import SFTTrainer

        self._trainer: Any = SFTTrainer(
            model=run.model.base,
            args=SFTConfig(
                output_dir=str(start.parent / "trl"),
                use_cpu=True,
                bf16=False,  # the base is in its own dtype already
                gradient_checkpointing=False,  # ours has none either
                per_device_train_batch_size=self._rows_per_pass,
                max_length=None,
                report_to=[],
            ),
            train_dataset=datasets.Dataset.from_list([_as_trl(self._rows[0])]),
            processing_class=run.template.tokenizer,
            peft_config=peft_config(start),
        )
        load_weights(self._trainer.model, start)
        return self._trainer.model

    def _loss(self, rows: list[TokenRow], num_targets: int) -> Any:
        batch = dict(self._trainer.data_collator([_as_trl(row) for row in rows]))
        return self._trainer.compute_loss(self._model, batch, num_items_in_batch=num_targets)


def _num_targets(row: TokenRow) -> int:
    return sum(row.is_supervised[1:])


def _as_trl(row: TokenRow) -> dict[str, list[int]]:
    known = zip(row.input_ids, row.is_supervised, strict=True)
    return {
        "input_ids": row.input_ids,
        "labels": [token if learned else -100 for token, learned in known],
    }


RIVALS: dict[str, type[Peft]] = {"trl": Trl, "peft": Peft}
WHOLE = "ours_whole"
"""Ours through all layers, where only upper ones are adapted."""


def build(arm: str, content: dict[str, Any], home: str, start: str, rows_per_pass: int) -> Side:
    """Makes an arm in its own process."""
    from graft.engine.run import load_run

    run = load_run(Recipe.model_validate(content), Path(home))
    if arm == "ours":
        return Ours(run, Path(start))
    if arm == WHOLE:
        return Ours(run, None, keeps_lower_states=False)
    return RIVALS[arm](run, Path(start), rows_per_pass=rows_per_pass)


def recipe_of(options: argparse.Namespace) -> dict[str, Any]:
    """What all train."""
    found = _recipe_of(options)
    if options.upper_layers:
        from graft.engine.memory import ModelShape
        from graft.models import resolve_model

        section = Recipe.model_validate(found).model
        number = ModelShape.of(resolve_model(section, options.home)).num_layers
        found["method"]["layers_to_transform"] = [*range(number - options.upper_layers, number)]
    return found


def _recipe_of(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "model": {"source": options.model, "dtype": options.dtype, "device": "cpu"},
        "data": {"train": str(DATA / "train.jsonl"), "max_length": MAX_LENGTH},
        "method": {"type": "lora", "r": 16},
        "train": {
            "steps": 4000,
            "batch_size": options.batch_size,
            "lr": 2e-4,
            "schedule": "constant",
            "warmup_fraction": 0.0,
        },
    }


def gemm_limit(threads: int, dtype: str) -> float:
    """Floating-point operations a second of a large product: the median of the fastest half."""
    import torch

    torch.set_num_threads(threads)
    size = 2048
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    left, right = (torch.randn(size, size, dtype=kind) for _ in range(2))
    seconds = []
    for _ in range(20):
        began = time.perf_counter()
        torch.mm(left, right)
        seconds.append(time.perf_counter() - began)
    return 2.0 * size**3 / statistics.median(sorted(seconds)[:10])


def work_of_step(options: argparse.Namespace) -> tuple[float, float]:
    """Real tokens of a step, and the operations that it cannot do without.

    A frozen weight takes two a token forward and two backward, an adapter's six; the head is needed
    at supervised positions alone, and layers below the adapted ones in no step. Attention's own are
    left out.
    """
    from graft.engine.run import load_run

    run = load_run(Recipe.model_validate(recipe_of(options)), options.home)
    rows, _ = rows_of(run, options.batch_size)
    tokens = sum(len(row.input_ids) for row in rows) / STEPS
    targets = sum(_num_targets(row) for row in rows) / STEPS
    head = run.model.base.get_output_embeddings().weight.numel()
    method = run.recipe.method
    lowest = min(method.layers_to_transform or (0,)) if isinstance(method, LoraMethod) else 0
    layers = sum(p.numel() for p in run.model.base.model.layers[lowest:].parameters())
    fresh = run.model.fresh_tensors(run.recipe.method)
    adapter = sum(tensor.numel() for of_site in fresh.values() for tensor in of_site.values())
    return tokens, 4.0 * (tokens * layers + targets * head) + 6.0 * tokens * adapter


def figures_of(found: dict[str, Any], tokens: float, work: float, limit: float) -> dict[str, float]:
    """Ratios of ours to each rival's, round by round."""
    seconds, losses, peaks = found["step_seconds"], found["held_out_losses"], found["peak_bytes"]
    figures = {
        "tokens_per_s": tokens / statistics.median(seconds["ours"]),
        "gemm_gflop_per_s": limit / 1e9,
        "share_of_gemm_limit": work / limit / statistics.median(seconds["ours"]),
    }
    for rival, name in (("trl", "trl"), ("peft", "plain_peft"), (WHOLE, "whole")):
        if rival not in seconds:
            continue
        speeds = [b / a for a, b in zip(seconds["ours"], seconds[rival], strict=True)]
        figures |= {
            f"tokens_per_s_vs_{name}": statistics.median(speeds),
            f"tokens_per_s_vs_{name}_worst": min(speeds),
            f"tokens_per_s_vs_{name}_best": max(speeds),
            f"memory_vs_{name}": peaks["ours"] / peaks[rival],
        }
    figures["loss_difference"] = max(abs(losses["ours"] - loss) / loss for loss in losses.values())
    return figures


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_race_options(parser)
    parser.set_defaults(rounds=5, steps=STEPS)
    parser.add_argument("--rows-per-pass", type=int, default=4, help="of the rivals")
    parser.add_argument("--upper-layers", type=int, default=0, help="adapted; 0 means all")
    parser.add_argument("--quick", action="store_true", help="two rounds of two steps")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.steps = 2, 2
    with tempfile.TemporaryDirectory(prefix="graft-benchmark-") as scratch:
        start = str(Path(scratch) / "start")
        given = (recipe_of(options), str(options.home), start, options.rows_per_pass)
        arms = ("ours", *([WHOLE] if options.upper_layers else []), *RIVALS)
        sides = {arm: partial(build, arm, *given) for arm in arms}
        found = race("finetune", sides, options, tolerance=LOSSES_AGREE[options.dtype])
    tokens, work = work_of_step(options)
    figures = figures_of(found, tokens, work, gemm_limit(options.threads, options.dtype))
    print({name: round(value, 3) for name, value in figures.items()}, flush=True)
    write_result(options.json, figures, [found], options.threads, vars(options))


if __name__ == "__main__":
    main()
