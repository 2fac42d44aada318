"""One worker of a DeepSpeed run on the tiny model, started by `torch.distributed.run`.

Prints nothing; rank 0 writes `losses.json` and checkpoints below the folder it is given.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch

from graft.data.records import Example, Message, TokenRow
from graft.data.template import ChatTemplate
from graft.engine.backends.deepspeed import DeepSpeedBackend
from graft.engine.checkpoint import newest_checkpoint, save_checkpoint
from graft.engine.multi import MultiAdapterModel
from graft.engine.train import Trainer
from graft.objectives._scored import scored_row
from graft.objectives.base import Objective
from graft.recipe.sections import OffloadSection, Recipe, ScaleSection, TrainSection
from graft.testing import tiny_model, tiny_tokenizer
from graft.testing.tiny import tiny_rows

STEPS = 8


def tiny_token_rows(num_rows: int = 40) -> list[TokenRow]:
    """Rows of very uneven length, so that workers get unequal numbers of micro-batches."""
    draw = random.Random(0)
    rows = []
    for index in range(num_rows):
        length = draw.choice([4, 6, 9, 30])
        ids = [draw.randrange(384) for _ in range(length)]
        supervised = [position >= length // 2 for position in range(length)]
        rows.append(TokenRow(ids, supervised, f"row {index}"))
    return rows


def preference_rows(kind: str, num_rows: int = 40) -> list[TokenRow]:
    """Pairs of answers of very uneven length; for `kto` one answer each, with its label."""
    draw = random.Random(1)
    rows = []
    for index in range(num_rows):
        lengths = [draw.choice([2, 4, 15]) for _ in range(2 if kind == "kto" else 3)]
        branch = [number for number, count in enumerate(lengths) for _ in range(count)]
        ids = [draw.randrange(384) for _ in branch]
        label = float(index % 2) if kind == "kto" else None
        rows.append(TokenRow(ids, [k > 0 for k in branch], f"row {index}", branch, label))
    return rows


def asking_rows(objective: Objective) -> list[TokenRow]:
    """Rows of the tiny task, as an objective that samples takes them."""
    rows = []
    for index, row in enumerate(tiny_rows(20)):
        messages = tuple(Message(**message) for message in row["messages"])
        rows += objective.rows(Example(source=f"row {index}", messages=messages), TEMPLATE)
    return rows


def packed_documents(objective: Objective) -> list[TokenRow]:
    """Documents of very uneven length, several in a row."""
    draw = random.Random(2)
    words = ["light", "kitchen", "turn", "off", "the"]
    texts = [" ".join(draw.choices(words, k=draw.choice([2, 5, 20]))) for _ in range(80)]
    rows = [
        row
        for index, text in enumerate(texts)
        for row in objective.rows(Example(source=f"row {index}", text=text), TEMPLATE)
    ]
    return objective.pack(rows, 48)


def rows_for(objective: Objective) -> list[TokenRow]:
    """Rows that an objective learns from."""
    if objective.type == "sft":
        return tiny_token_rows()
    if objective.type == "pretrain":
        return packed_documents(objective)
    if "rollouts" in objective.needs:
        return asking_rows(objective)
    rows = preference_rows(objective.type)
    return [scored_row(row) for row in rows] if objective.scores_answers else rows


TEMPLATE = ChatTemplate(tiny_tokenizer())
SFT = {"type": "sft"}
LORA = {"type": "lora", "r": 4, "lora_dropout": 0.1}


def zero_recipe(
    method: dict[str, Any], dtype: str = "fp32", objective: dict[str, Any] = SFT
) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"source": "tiny", "dtype": dtype},
            "data": {"train": "none.jsonl", "eval": "none.jsonl"},
            "method": method,
            "objective": objective,
            "train": TrainSection(
                steps=STEPS,
                batch_size=7,
                lr=5e-3,
                weight_decay=0.01,
                max_grad_norm=0.3,
                micro_batch_tokens=40,
            ),
        }
    )


def run(
    trainer: Trainer,
    folder: Path,
    until: int,
    *,
    is_writer: bool,
    method: dict[str, Any] = LORA,
    objective: dict[str, Any] = SFT,
) -> None:
    """Trains from the newest checkpoint in the folder up to step `until`."""
    found = newest_checkpoint(folder / "checkpoints")
    state = found[0] if found else None
    recipe = zero_recipe(method, objective=objective)
    trainer.join("slot", recipe, rows_for(recipe.objective), state=state)
    losses = []
    for _ in range(until - (state.step if state else 0)):
        report = trainer.step()["slot"]
        losses.append([report.step, report.loss, report.grad_norm])
    saved = trainer.state("slot")
    if is_writer:
        save_checkpoint(folder / "checkpoints", saved, {})
        old = folder / "losses.json"
        earlier = json.loads(old.read_text()) if old.exists() else []
        old.write_text(json.dumps(earlier + losses))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stage", type=int, required=True)
    parser.add_argument("--until", type=int, default=STEPS)
    parser.add_argument("--offload", default="none")
    parser.add_argument("--method", type=json.loads, default=LORA)
    parser.add_argument("--objective", type=json.loads, default=SFT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = MultiAdapterModel(tiny_model())
    offload = OffloadSection(
        optimizer=arguments.offload,
        parameters=arguments.offload if arguments.stage == 3 else "none",
    )
    torch.distributed.init_process_group("gloo")
    backend = DeepSpeedBackend(model, ScaleSection(zero_stage=arguments.stage, offload=offload))
    trainer = Trainer(model, backend, TEMPLATE)
    run(
        trainer,
        arguments.folder,
        arguments.until,
        is_writer=backend.world_rank == 0,
        method=arguments.method,
        objective=arguments.objective,
    )
    if arguments.stage == 3:
        for name, parameter in model.base.named_parameters():
            # DeepSpeed leaves the few numbers of a vector whole.
            if parameter.dim() == 2 and 1 not in parameter.shape:
                assert parameter.numel() == 0, f"{name} is whole under ZeRO-3"
    torch.distributed.barrier()  # gloo aborts a process whose neighbour is gone already
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
