"""Predicted against measured memory: a training run's peak, told from `config.json` and taken.

    python -m benchmarks.memory --json OUT [--quick] [--model DIR]

Every combination runs in a process of its own, in which all is imported: it trains a tiny model of
the same kind, so that libraries have made themselves at home, notes its resident memory, and then
loads the base, trains a few steps and copies a checkpoint. Its peak above that note is the kernel's
own high mark (`VmHWM`); on a GPU it is the peak of torch's allocator. The prediction is made in
another process, from the same recipe and `config.json`.

What makes peaks of a CPU reproducible: glibc keeps what is freed for later, in one arena a thread
and in holes that fit or not. Here it has one arena and maps every block of 64 KiB or more by
itself, so that resident memory is what tensors occupy; products run on one thread.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks._result import write_result
from graft.recipe.sections import Recipe

MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(64 << 10),
    "MALLOC_MMAP_MAX_": str(1 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(128 << 10),
    "MALLOC_TOP_PAD_": "0",
}
THREADS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
STEPS = 2
"""The first one makes the optimizer's moments, the second one has them all along."""
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"layers": 2, "hidden": 64, "inner": 128, "heads": 4, "kv_heads": 2, "vocab": 512},
    "deep": {"layers": 4, "hidden": 512, "inner": 1408, "heads": 8, "kv_heads": 4, "vocab": 4096},
    "wide": {
        "layers": 2,
        "hidden": 768,
        "inner": 2048,
        "heads": 12,
        "kv_heads": 12,
        "vocab": 16384,
    },
}
Cell = dict[str, Any]


def cells(model: str | None, *, quick: bool) -> list[Cell]:
    """Lays out the combinations."""
    if quick:
        return [
            cell("deep", "lora", "bf16", rows=4, length=128),
            cell("deep", "full", "fp32", rows=2, length=128, checkpoints=True),
            cell("deep", "dora", "nf4", rows=4, length=128),
        ]
    storages = ("fp32", "bf16", "int8", "nf4")
    found = [
        cell("deep", "lora", storage, rows=768 // length, length=length, checkpoints=checkpoints)
        for storage in storages
        for length in (128, 384)
        for checkpoints in (False, True)
    ]
    found += [
        cell("deep", "full", storage, rows=tokens // 256, length=256, checkpoints=checkpoints)
        for storage in ("fp32", "bf16")
        for tokens in (256, 768)
        for checkpoints in (False, True)
    ]
    found += [
        cell("deep", "dora", storage, rows=4, length=256, checkpoints=checkpoints)
        for storage in ("bf16", "nf4")
        for checkpoints in (False, True)
    ]
    others = ("ia3", "bottleneck", "prefix", "prompt")
    found += [cell("deep", method, "bf16", rows=2, length=384) for method in others]
    found += [
        cell("wide", "lora", "bf16", rows=4, length=256),
        cell("wide", "lora", "nf4", rows=4, length=256, checkpoints=True),
        cell("deep", "lora", "bf16", rows=2, length=128, slots=4),
        cell("deep", "lora", "fp32", rows=4, length=256, batch=12),
        cell("deep", "lora", "bf16", rows=4, length=256, spread=100),
    ]
    if model is not None:
        found += [
            cell(model, "lora", storage, rows=512 // length, length=length, checkpoints=checkpoints)
            for storage, length in (("bf16", 128), ("bf16", 512), ("nf4", 128))
            for checkpoints in (False, True)
        ]
    return found


def cell(
    model: str,
    method: str,
    storage: str,
    *,
    rows: int,
    length: int,
    checkpoints: bool = False,
    slots: int = 1,
    batch: int | None = None,
    spread: int = 0,
) -> Cell:
    """One combination; `rows` are a slot's in one forward pass, `batch` those of its step."""
    return {
        "model": model,
        "method": method,
        "storage": storage,
        "rows": rows,
        "length": length,
        "checkpoints": checkpoints,
        "slots": slots,
        "batch": batch or rows,
        "spread": spread,
    }


def recipe_of(of: Cell, folder: str, device: str) -> Recipe:
    """What is trained."""
    quantized = of["storage"] in ("int8", "nf4")
    return Recipe.model_validate(
        {
            "model": {
                "source": folder,
                "dtype": "bf16" if quantized else of["storage"],
                "quantization": {"type": of["storage"] if quantized else "none"},
                "device": device,
            },
            "data": {"train": "rows.jsonl", "max_length": of["length"]},
            "method": {"type": of["method"]},
            "train": {
                "batch_size": of["batch"],
                "micro_batch_tokens": of["rows"] * of["length"] * of["slots"],
                "steps": STEPS,
            },
            "scale": {"gradient_checkpointing": of["checkpoints"]},
        }
    )


def rows_of(of: Cell) -> list[Any]:
    """Training rows, half of each supervised; `spread` makes them differ in length."""
    from graft.data.records import TokenRow

    rows = []
    for number in range(of["batch"]):
        length = of["length"] - (number * of["spread"]) // of["batch"]
        ids = [3 + (7 * at + number) % 200 for at in range(length)]
        rows.append(TokenRow(ids, [at >= length // 2 for at in range(length)], f"row {number}"))
    return rows


def make_model(folder: Path, name: str, storage: str) -> Path:
    """Writes a Llama with random weights, in the dtype that the base will have."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    target = folder / f"{name}-{'fp32' if storage == 'fp32' else 'bf16'}"
    if target.exists():
        return target
    size = SHAPES[name]
    config = LlamaConfig(
        vocab_size=size["vocab"],
        hidden_size=size["hidden"],
        intermediate_size=size["inner"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        num_key_value_heads=size["kv_heads"],
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.to(torch.float32 if storage == "fp32" else torch.bfloat16).save_pretrained(target)
    return target


def train(of: Cell, folder: str, device: str) -> None:
    """Loads the base, trains every slot for a few steps, copies a checkpoint."""
    from graft.engine.multi import MultiAdapterModel
    from graft.engine.recompute import recompute_layers
    from graft.engine.train import Trainer
    from graft.models import ReadyModel, load_model

    recipe = recipe_of(of, folder, device)
    ready = ReadyModel(path=Path(folder), digest="", template_digest="", source=folder)
    model = MultiAdapterModel(load_model(ready, recipe.model))
    if of["checkpoints"]:
        recompute_layers(model)
    trainer = Trainer(model)
    names = [f"slot{number}" for number in range(of["slots"])]
    for name in names:
        trainer.join(name, recipe, rows_of(of))
    for _ in range(STEPS):
        trainer.step()
    for name in names:
        trainer.state(name)


def measure(of: Cell, folder: str, warm_folder: str, device: str) -> int:
    """Peak bytes of such a run above the process without it; to be asked in a fresh process."""
    import torch

    from graft.pipelines.compare_memory import PeakMemory

    memory = PeakMemory(torch.device(device))
    short = 16 if of["length"] <= 256 else 272  # short rows have an attention kernel of their own
    train({**of, "rows": 2, "batch": 2, "length": short, "spread": 0}, warm_folder, device)
    before = memory.now_bytes()
    memory.begin()
    train(of, folder, device)
    return memory.peak_bytes() - before


def measured(of: Cell, folder: Path, warm_folder: Path, device: str) -> int:
    """The same, from a process of its own: a fork of this one, which has imported all."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def work() -> None:
        theirs.send(measure(of, str(folder), str(warm_folder), device))

    process = context.Process(target=work)
    process.start()
    theirs.close()
    try:
        return int(ours.recv())
    except EOFError:
        raise SystemExit(f"{of}: its process ended without a measurement") from None
    finally:
        process.join()


def compare(of: Cell, scratch: Path, device: str) -> dict[str, Any]:
    """One combination's prediction and measurement."""
    from graft.engine.memory import ModelShape, Workload, predict_memory

    is_made = of["model"] in SHAPES
    folder = make_model(scratch, of["model"], of["storage"]) if is_made else Path(of["model"])
    warm_folder = make_model(scratch, "tiny", of["storage"])
    recipe = recipe_of(of, str(folder), device)
    work = Workload.of_rows(recipe, rows_of(of), of["slots"])
    estimate = predict_memory(
        recipe,
        ModelShape.of(folder),
        "cuda" if device == "cuda" else "cpu",
        work=work,
        slots=of["slots"],
    )
    peak = estimate.peak
    predicted = peak.total_bytes("device", exclude=("process", "CUDA context"))
    of_step = {part.name: part.size_bytes for part in peak.parts if part.place == "device"}
    moving = sum(of_step.get(name, 0) for name in MOVING)
    found = measured(of, folder, warm_folder, device)
    return {
        **of,
        "predicted_bytes": predicted,
        "measured_bytes": found,
        "error": predicted / found - 1,
        "activation_fraction": moving / predicted,
        "moment": peak.name,
        "parts": of_step,
    }


MOVING = ("activations", "logits", "temporaries", "scratch of kernels")
"""Parts that grow with tokens."""


def figures_of(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """The errors of all combinations; an under-prediction is a share of what was measured."""
    return {
        "median_error": statistics.median(abs(row["error"]) for row in rounds),
        "worst_underprediction": max(0.0, *(-row["error"] for row in rounds)),
        "worst_overprediction": max(0.0, *(row["error"] for row in rounds)),
        "combinations": len(rounds),
        "activations_at_least_half": sum(row["activation_fraction"] >= 0.5 for row in rounds),
    }


def settle() -> None:
    """Starts this program anew under the settings that make peaks reproducible, and imports all."""
    wanted = {**MALLOC, **THREADS}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        command = [sys.executable, "-m", "benchmarks.memory", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **wanted})


def show(row: dict[str, Any]) -> None:
    """Prints a line."""
    name = "/".join(str(row[k]) for k in ("model", "method", "storage", "rows", "length"))
    print(
        f"{name[-34:]:35}{'recomputed' if row['checkpoints'] else '':11}"
        f"{row['predicted_bytes'] / 1e6:9.1f} MB{row['measured_bytes'] / 1e6:9.1f} MB"
        f"{row['error']:+8.1%}{row['activation_fraction']:6.0%}  {row['moment']}",
        flush=True,
    )


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="folder of a model to measure beside those made in code")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="three combinations")
    parser.add_argument("--only", default="", help="combinations whose line holds this")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    settle()
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="graft-benchmark-") as scratch:
        for of in cells(options.model, quick=options.quick):
            if options.only not in json.dumps(of):
                continue
            rounds.append(compare(of, Path(scratch), options.device))
            show(rounds[-1])
            if options.json:
                write_result(options.json, figures_of(rounds), rounds, 1, vars(options))
    print({name: round(value, 4) for name, value in figures_of(rounds).items()})


if __name__ == "__main__":
    main()
