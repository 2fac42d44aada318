"""A trial as TRL's users run it, in a process of its own.

    python -m benchmarks._sweep_trl TASK INDEX OUT

Nothing of GRAFT is imported: its imports would be the rival's start-up.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import PeftConfig, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from benchmarks._sweep_task import Task, read_task


class FirstStep(TrainerCallback):
    """Notes when the first step is done."""

    ended_s: float | None = None

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Notes the first call."""
        self.ended_s = self.ended_s or time.time()


class RecordedTrainer(SFTTrainer):
    """Keeps each step's loss, which TRL would log."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """TRL's own."""
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if model.training:
            self.losses.append(loss.detach())
        return loss


def run_trial(task: Task, index: int, out: Path) -> dict[str, Any]:
    """Trains, measures and saves one trial."""
    trial = task.trials[index]
    torch.set_num_threads(task.threads)
    config = PeftConfig.from_pretrained(trial.start)
    config.inference_mode = False
    first_step = FirstStep()
    trainer = RecordedTrainer(
        model=AutoModelForCausalLM.from_pretrained(task.model, dtype=getattr(torch, task.dtype)),
        args=SFTConfig(
            output_dir=str(out / "trainer"),
            use_cpu=True,
            bf16=False,  # the base is in its own dtype already
            gradient_checkpointing=False,
            max_steps=task.steps,
            per_device_train_batch_size=task.batch_size,
            per_device_eval_batch_size=len(task.held_out),
            train_sampling_strategy="sequential",  # the rows are in the order of the steps
            learning_rate=trial.lr,
            lr_scheduler_type="constant",
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            dataloader_pin_memory=False,
            prediction_loss_only=True,
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
            report_to=[],
        ),
        train_dataset=datasets.Dataset.from_dict({"input_ids": task.rows}),
        eval_dataset=datasets.Dataset.from_dict({"input_ids": task.held_out}),
        processing_class=AutoTokenizer.from_pretrained(task.model),
        peft_config=config,
        callbacks=[first_step],
    )
    trainer.losses = []
    set_peft_model_state_dict(
        trainer.model, load_file(Path(trial.start) / "adapter_model.safetensors")
    )
    trainer.train()
    held_out_loss = trainer.evaluate()["eval_loss"]
    adapter = out / f"adapter-{index}"
    trainer.model.save_pretrained(adapter)
    return {
        "losses": [float(loss) for loss in trainer.losses],
        "held_out_loss": held_out_loss,
        "steps": len(trainer.losses),
        "first_step_s": first_step.ended_s,
        "ended_s": time.time(),
        "adapter": str(adapter),
    }


if __name__ == "__main__":
    given, number, folder = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    found = run_trial(read_task(given), number, folder)
    (folder / f"{number}.json").write_text(json.dumps(found), encoding="utf-8")
