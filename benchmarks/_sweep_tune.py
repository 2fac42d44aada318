"""A sweep as Ray Tune's users run it at its best: actors that keep the base from trial to trial.

    python -m benchmarks._sweep_tune TASK ACTORS OUT [--asha]

Nothing of GRAFT is imported: its imports would be the rival's start-up.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler

from benchmarks._sweep_task import read_task


class LoraTrial(tune.Trainable):
    """A plain loop around PEFT's model; another trial is another adapter on the loaded base."""

    def setup(self, config: dict[str, Any]) -> None:
        """Loads the base."""
        import torch
        from transformers import AutoModelForCausalLM

        self._task, self._out = read_task(Path(config["task"])), Path(config["out"])
        torch.set_num_threads(config["threads"])
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            self._task.model, dtype=getattr(torch, self._task.dtype)
        )
        self._adapter: str | None = None
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Swaps the adapter."""
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        import torch
        from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
        from safetensors.torch import load_file

        self._trial = self._task.trials[config["index"]]
        adapter, before = f"trial-{config['index']}", self._adapter
        settings = PeftConfig.from_pretrained(self._trial.start)
        settings.inference_mode = False
        if before is None:
            self._model = get_peft_model(self._model, settings, adapter_name=adapter)
        else:
            self._model.add_adapter(adapter, settings)
            self._model.set_adapter(adapter)
            self._model.delete_adapter(before)
        weights = load_file(Path(self._trial.start) / "adapter_model.safetensors")
        set_peft_model_state_dict(self._model, weights, adapter_name=adapter)
        self._adapter = adapter
        self._parameters = [p for p in self._model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=self._trial.lr, weight_decay=0.0, fused=True
        )
        self._losses: list[float] = []
        self._first_step_s: float | None = None

    def step(self) -> dict[str, Any]:
        """Trains to the next report and measures."""
        self._model.train()
        while True:
            self._losses.append(self._learn(len(self._losses)))
            if len(self._losses) % self._task.report_every == 0:
                break
        is_done = len(self._losses) >= self._task.steps
        return {
            "losses": self._losses,
            "held_out_loss": self._held_out_loss(),
            "steps": len(self._losses),
            "first_step_s": self._first_step_s,
            "adapter": self._save() if is_done else None,
            "ended_s": time.time(),
            "done": is_done,
        }

    def _learn(self, step: int) -> float:
        import torch

        size = self._task.batch_size
        rows = torch.tensor(self._task.rows[step * size : (step + 1) * size])
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._first_step_s = self._first_step_s or time.time()
        return float(loss.detach())

    def _held_out_loss(self) -> float:
        import torch

        self._model.eval()
        rows = torch.tensor(self._task.held_out)
        with torch.inference_mode():
            return float(self._model(input_ids=rows, labels=rows, use_cache=False).loss)

    def _save(self) -> str:
        self._model.save_pretrained(self._out, selected_adapters=[self._adapter])
        return str(self._out / str(self._adapter))


def run_sweep(path: Path, actors: int, out: Path, *, has_asha: bool) -> list[dict[str, Any]]:
    """Runs all trials of a task; returns the last report of each, in their order."""
    task = read_task(path)
    threads = max(1, task.threads // actors)
    ray.init(
        address="local",
        num_cpus=actors * threads,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    asha = AsyncHyperBandScheduler(
        time_attr="steps",
        max_t=task.steps,
        grace_period=task.report_every,
        reduction_factor=2,
        stop_last_trials=False,
    )
    tuner = tune.Tuner(
        tune.with_resources(LoraTrial, {"cpu": threads}),
        param_space={
            "task": str(path),
            "out": str(out),
            "threads": threads,
            "index": tune.grid_search(list(range(len(task.trials)))),
        },
        tune_config=tune.TuneConfig(
            metric="held_out_loss",
            mode="min",
            scheduler=asha if has_asha else None,
            max_concurrent_trials=actors,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(out),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
        ),
    )
    results = {}
    for result in tuner.fit():
        if result.error is not None:
            raise result.error
        results[result.config["index"]] = result.metrics
    names = ("losses", "held_out_loss", "steps", "first_step_s", "adapter", "ended_s")
    return [{name: results[index][name] for name in names} for index in sorted(results)]


if __name__ == "__main__":
    given, number, folder = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    found = run_sweep(given, number, folder, has_asha="--asha" in sys.argv[4:])
    (folder / "trials.json").write_text(json.dumps(found), encoding="utf-8")
