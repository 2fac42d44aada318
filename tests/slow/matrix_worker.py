"""What each worker of the matrix test does in its Ray Train run: one ZeRO stage, cell by cell.

The first worker writes what each cell came to below the folder it is given.
"""

from __future__ import annotations

import gc
import json
import traceback
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import nn

from graft.engine.backends.base import Backend
from graft.engine.backends.deepspeed import DeepSpeedBackend
from graft.engine.multi import MultiAdapterModel
from graft.engine.recompute import recompute_layers
from graft.engine.train import Trainer
from graft.models import load_model, resolve_model
from graft.recipe.sections import Recipe
from tests.slow.zero_worker import tiny_token_rows

STEPS = 5
LR = 5e-3
LORA = {"type": "lora", "r": 4, "lora_dropout": 0.1}
DORA = {"type": "dora", "r": 4, "lora_dropout": 0.1}
METHODS: dict[str, tuple[dict[str, Any], str]] = {
    "lora": (LORA, "none"),
    "dora": (DORA, "none"),
    "int8-lora": (LORA, "int8"),
    "qlora": (LORA, "nf4"),
    "qdora": (DORA, "nf4"),
    "full": ({"type": "full"}, "none"),
    "prefix": ({"type": "prefix", "num_virtual_tokens": 6}, "none"),
}
"""Name → method and quantization of its base."""
WIDE = "wide"
"""Folder of a model whose weights are large enough for DeepSpeed to swap them to a disk."""


class Cell(NamedTuple):
    """One combination."""

    name: str
    stage: int
    offload: str
    checkpointing: bool
    dtype: str = "fp32"

    @property
    def file(self) -> str:
        """Where its results are, without ending."""
        return f"{self.name}-{self.offload}-{self.checkpointing}-{self.dtype}"


def cells(stage: int, *, nvme: bool) -> list[Cell]:
    """All combinations at a stage; those of the NVMe disk stand alone, without packed weights."""
    if nvme:
        whole = [name for name, (_, quantization) in METHODS.items() if quantization == "none"]
        return [Cell(name, stage, "nvme", on) for name in whole for on in (False, True)]
    places = ("none", "cpu") if stage else ("none",)
    wide = [Cell(*parts) for parts in product(METHODS, (stage,), places, (False, True))]
    narrow = [Cell(name, stage, "none", True, "bf16") for name in ("dora", "qlora", "full")]
    return wide + narrow


def cell_recipe(cell: Cell, source: Path, disk: Path | None = None) -> Recipe:
    """A cell as a recipe; one that no method or section refuses."""
    method, quantization = METHODS[cell.name]
    scale: dict[str, Any] = {}
    if cell.stage or cell.offload != "none":
        scale = {"workers": 2, "zero_stage": cell.stage}
    if cell.offload != "none":
        parameters = cell.offload if cell.stage == 3 else "none"
        scale["offload"] = {"optimizer": cell.offload, "parameters": parameters}
        if cell.offload == "nvme":
            scale["offload"]["nvme_path"] = str(disk)
    return Recipe.model_validate(
        {
            "model": {
                "source": str(source),
                "dtype": cell.dtype,
                "quantization": {"type": quantization, "double": True},
            },
            "data": {"train": "none.jsonl"},
            "method": method,
            "train": {
                "steps": STEPS,
                "batch_size": 7,
                "lr": LR / 10 if source.name == WIDE else LR,
                "weight_decay": 0.01,
                "max_grad_norm": 0.3,
                "micro_batch_tokens": 40,
            },
            "scale": {**scale, "gradient_checkpointing": cell.checkpointing},
        }
    )


def load(recipe: Recipe, home: Path) -> MultiAdapterModel:
    """The base of a cell."""
    model = MultiAdapterModel(load_model(resolve_model(recipe.model, home), recipe.model))
    if recipe.scale.gradient_checkpointing:
        recompute_layers(model)
    return model


def train(
    recipe: Recipe, model: MultiAdapterModel, backend: Backend | None
) -> tuple[list[list[float]], dict[str, torch.Tensor]]:
    """Losses and gradient norms by step, and the weights after the last one."""
    trainer = Trainer(model, backend)
    trainer.join("slot", recipe, tiny_token_rows())
    reports = [trainer.step()["slot"] for _ in range(STEPS)]
    tensors = trainer.state("slot").tensors
    weights = {f"{s}.{key}": value for s, of in tensors.items() for key, value in of.items()}
    return [[r.loss, r.grad_norm] for r in reports], weights


def whole_weights(base: nn.Module) -> list[str]:
    """Names of the base's weights of which this worker holds more than its half."""
    found = []
    for name, parameter in base.named_parameters():
        kept = getattr(parameter, "ds_tensor", None)
        is_half = kept is not None and kept.numel() <= -(-parameter.ds_numel // 2)
        if parameter.numel() or not is_half:
            found.append(name)
    return found


def run(cell: Cell, source: Path, folder: Path) -> dict[str, Any]:
    """Trains a cell on this worker; says what it came to, or why it did not."""
    try:
        recipe = cell_recipe(cell, source, folder)
        model = load(recipe, folder)
        backend = DeepSpeedBackend(model, recipe.scale, persistence_threshold=0)
        steps, weights = train(recipe, model, backend)
        if backend.world_rank == 0:
            save_file(weights, folder / f"{cell.file}.safetensors")
        whole = whole_weights(model.base) if cell.stage == 3 else []
        backend.detach("slot")
        return {"steps": steps, "whole": whole}
    except Exception:  # the other cells go on
        return {"failure": traceback.format_exc()}


def work(source: Path, folder: Path, stage: int) -> None:
    """Runs all cells of a stage; on the wide model those that swap to a disk."""
    torch.set_num_threads(1)
    for cell in cells(stage, nvme=source.name == WIDE):
        found = run(cell, source, folder)
        if torch.distributed.get_rank() == 0:
            (folder / f"{cell.file}.json").write_text(json.dumps(found))
        gc.collect()
