"""ZeRO stage × method × offload × checkpointing: two workers follow one process, step by step."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from safetensors.torch import load_file

from graft.data.records import TokenRow
from graft.engine.backends.ops import build_ops, obstacle, ops_of
from graft.engine.order import batch_rows
from graft.engine.schedule import learning_rate
from graft.recipe.sections import Recipe
from graft.runtime.session import ray_session
from graft.testing import save_tiny_model, tiny_model, tiny_tokenizer
from tests.slow.matrix_worker import (
    LR,
    METHODS,
    STEPS,
    WIDE,
    Cell,
    cell_recipe,
    cells,
    load,
    train,
    work,
)
from tests.slow.zero_worker import tiny_token_rows

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\."),
]

CELLS = [cell for stage in range(4) for cell in cells(stage, nvme=False)]
ON_DISK = cells(3, nvme=True)
LOSS_ATOL = {"fp32": 1e-4, "bf16": 0.05}
NORM_RTOL = {"fp32": 1e-3, "bf16": 0.1}

Run = tuple[list[list[float]], dict[str, torch.Tensor]]


def name_of(cell: Cell) -> str:
    return f"zero{cell.stage}-{cell.file}"


def plain_loop(recipe: Recipe, model: torch.nn.Module) -> Run:
    """transformers' forward, torch's AdamW, one row at a time, written as anybody would."""
    settings, rows = recipe.train, tiny_token_rows()
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay
    )
    steps = []
    for step in range(STEPS):
        taken = [rows[i] for i in batch_rows(settings.seed, step, settings.batch_size, len(rows))]
        loss = mean_loss(model, taken)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        steps.append([float(loss.detach()), float(norm)])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        optimizer.step()
        optimizer.zero_grad()
    return steps, {name: p.detach() for name, p in model.named_parameters()}


def mean_loss(model: torch.nn.Module, taken: list[TokenRow]) -> torch.Tensor:
    """Mean over the supervised tokens of all rows; a row's first token is never predicted."""
    total, count = torch.zeros(()), 0
    for row in taken:
        ids = torch.tensor([row.input_ids])
        logits = model(input_ids=ids).logits[0, :-1]
        is_target = torch.tensor(row.is_supervised[1:])
        total = total + torch.nn.functional.cross_entropy(
            logits[is_target], ids[0, 1:][is_target], reduction="sum"
        )
        count += int(is_target.sum())
    return total / count


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny model; and one with weights large enough for DeepSpeed to swap them to a disk."""
    folder = tmp_path_factory.mktemp("sources")
    tiny_model(hidden_size=1024).save_pretrained(folder / WIDE)
    tiny_tokenizer().save_pretrained(folder / WIDE)
    return {"tiny": save_tiny_model(folder / "tiny"), WIDE: folder / WIDE}


@pytest.fixture(scope="module")
def alone(
    sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Cell, str], Run]:
    """What a cell's method comes to in one process, everything kept."""
    home = tmp_path_factory.mktemp("home")

    @cache
    def run(name: str, dtype: str, source: str) -> Run:
        recipe = cell_recipe(Cell(name, 0, "none", False, dtype), sources[source])
        model = load(recipe, home)
        if name == "full" and dtype == "fp32":
            return plain_loop(recipe, model.base)
        return train(recipe, model, None)

    return lambda cell, source: run(cell.name, cell.dtype, source)


@pytest.fixture(scope="module")
def workers(
    sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int, str], Path]:
    """Runs all cells of a stage in one Ray Train run; returns where their results are."""

    @cache
    def run_stage(stage: int, source: str) -> Path:
        folder = tmp_path_factory.mktemp(f"zero{stage}")
        with ray_session(num_cpus=2):
            TorchTrainer(
                lambda: work(sources[source], folder, stage),
                scaling_config=ScalingConfig(num_workers=2),
                torch_config=TorchConfig(backend="gloo"),
                run_config=RunConfig(name="ray", storage_path=str(folder)),
            ).fit()
        return folder

    return run_stage


def assert_follows(folder: Path, cell: Cell, alone: Run) -> None:
    found = json.loads((folder / f"{cell.file}.json").read_text())
    assert "failure" not in found, found["failure"]
    steps, expected = alone
    for given, wanted in zip(found["steps"], steps, strict=True):
        assert given[0] == pytest.approx(wanted[0], abs=LOSS_ATOL[cell.dtype])
        assert given[1] == pytest.approx(wanted[1], rel=NORM_RTOL[cell.dtype])
    weights = load_file(folder / f"{cell.file}.safetensors")
    assert weights.keys() == expected.keys()
    for key, value in expected.items() if cell.dtype == "fp32" else ():
        assert_weights_follow(weights[key], value)
    assert found["whole"] == [], "ZeRO-3 left weights of the base whole"


def assert_weights_follow(given: torch.Tensor, wanted: torch.Tensor) -> None:
    """Adam makes a step of full length out of a gradient that is nothing but rounding.

    So one weight in a thousand may be further off, by a small part of what all steps come to.
    """
    difference = (given - wanted).abs()
    assert int((difference > 1e-4).sum()) <= max(1, difference.numel() // 1000)
    assert float(difference.max()) <= 0.05 * STEPS * LR


def require_ops(cell: Cell) -> None:
    ops = ops_of(cell_recipe(cell, Path("tiny"), Path("disk")).scale)
    for op in ops:
        if reason := obstacle(op):
            pytest.skip(reason)
    build_ops(ops)


@pytest.mark.parametrize("cell", CELLS, ids=name_of)
def test_two_workers_follow_one_process(
    cell: Cell, workers: Callable[[int, str], Path], alone: Callable[[Cell, str], Run]
) -> None:
    require_ops(Cell("lora", cell.stage, "cpu" if cell.stage else "none", False))
    assert_follows(workers(cell.stage, "tiny"), cell, alone(cell, "tiny"))


@pytest.mark.parametrize("cell", ON_DISK, ids=name_of)
def test_two_workers_that_swap_to_a_disk_follow_one_process(
    cell: Cell, workers: Callable[[int, str], Path], alone: Callable[[Cell, str], Run]
) -> None:
    require_ops(cell)
    folder = workers(3, WIDE)
    assert_follows(folder, cell, alone(cell, WIDE))
    assert not list(folder.glob("graft-swap-*")), "swapped weights are left on the disk"


@pytest.mark.parametrize("name", ["int8-lora", "qlora", "qdora"])
def test_packed_weights_are_not_swapped_to_a_disk(name: str) -> None:
    with pytest.raises(ValueError, match=r"one kind of number.*offload\.parameters cpu"):
        cell_recipe(Cell(name, 3, "nvme", False), Path("tiny"), Path("disk"))


def test_no_other_combination_is_refused() -> None:
    assert {cell.name for cell in CELLS} == set(METHODS)
    for cell in [*CELLS, *ON_DISK]:
        scale = cell_recipe(cell, Path("tiny"), Path("disk")).scale
        assert (scale.zero_stage, scale.gradient_checkpointing) == (cell.stage, cell.checkpointing)
