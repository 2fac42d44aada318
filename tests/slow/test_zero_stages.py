"""What the matrix does not have: resumes between stages, other methods, other objectives."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from graft.engine.checkpoint import newest_checkpoint
from graft.engine.multi import MultiAdapterModel
from graft.engine.train import Trainer
from graft.testing import tiny_model
from tests.slow.zero_worker import LORA, SFT, STEPS, TEMPLATE, run

HANGS_AFTER_S = 600
"""Far above what the slowest run takes on a busy machine: two workers share a core or less."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(5 * HANGS_AFTER_S)]


def deepspeed_run(
    folder: Path,
    *,
    workers: int,
    stage: int,
    until: int = STEPS,
    offload: str = "none",
    method: dict[str, Any] = LORA,
    objective: dict[str, Any] = SFT,
) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={workers}",
        str(Path(__file__).with_name("zero_worker.py")),
        str(folder),
        f"--stage={stage}",
        f"--until={until}",
        f"--offload={offload}",
        f"--method={json.dumps(method)}",
        f"--objective={json.dumps(objective)}",
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=HANGS_AFTER_S, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def torch_run(folder: Path, until: int = STEPS, objective: dict[str, Any] = SFT) -> None:
    trainer = Trainer(MultiAdapterModel(tiny_model()), template=TEMPLATE)
    run(trainer, folder, until, is_writer=True, objective=objective)


def losses_and_weights(folder: Path) -> tuple[list[list[float]], dict[str, torch.Tensor]]:
    found = newest_checkpoint(folder / "checkpoints")
    assert found is not None
    weights = {f"{s}.{k}": v for s, of in found[0].tensors.items() for k, v in of.items()}
    return json.loads((folder / "losses.json").read_text()), weights


def assert_same_training(folder: Path, alone: Path, tolerance: float = 1e-4) -> None:
    """Compares every step's loss and gradient norm, and the weights.

    Workers add up in another order, and Adam makes of a gradient of rounding size a step as large
    as of others: single weights differ by more than losses do, and by less than a step.
    """
    losses, weights = losses_and_weights(folder)
    expected_losses, expected_weights = losses_and_weights(alone)
    assert [row[0] for row in losses] == list(range(1, STEPS + 1))
    assert len(losses) == len(expected_losses)
    for given, expected in zip(losses, expected_losses, strict=True):
        assert given[1] == pytest.approx(expected[1], abs=1e-4)
        assert given[2] == pytest.approx(expected[2], rel=1e-3)
    assert weights.keys() == expected_weights.keys()
    for key, value in expected_weights.items():
        torch.testing.assert_close(weights[key], value, atol=tolerance, rtol=0)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    torch_run(folder)
    return folder


def test_a_checkpoint_goes_from_two_workers_to_one_process_and_to_zero_3(
    tmp_path: Path, alone: Path
) -> None:
    deepspeed_run(tmp_path, workers=2, stage=2, until=3)
    torch_run(tmp_path, until=5)
    deepspeed_run(tmp_path, workers=2, stage=3, until=6)
    deepspeed_run(tmp_path, workers=1, stage=0, until=7)
    deepspeed_run(tmp_path, workers=2, stage=1)
    assert_same_training(tmp_path, alone)


@pytest.mark.parametrize("stage", [2, 3])
def test_moments_come_back_where_no_tensor_divides_by_the_workers(
    stage: int, tmp_path: Path
) -> None:
    odd = {"type": "lora", "r": 5, "target_modules": ["q_proj", "o_proj"]}
    trainer = Trainer(MultiAdapterModel(tiny_model()))
    run(trainer, tmp_path / "alone", STEPS, is_writer=True, method=odd)
    deepspeed_run(tmp_path, workers=3, stage=stage, until=4, method=odd)
    deepspeed_run(tmp_path, workers=3, stage=stage, method=odd)
    assert_same_training(tmp_path, tmp_path / "alone")


VIRTUAL = {
    "prompt": {"type": "prompt", "num_virtual_tokens": 6},
    "ptuning": {"type": "ptuning", "num_virtual_tokens": 6, "encoder": "lstm"},
}


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("name", VIRTUAL)
def test_virtual_tokens_train_on_two_workers_as_in_one_process(
    name: str, stage: int, tmp_path: Path
) -> None:
    alone = tmp_path / "alone"
    trainer = Trainer(MultiAdapterModel(tiny_model()))
    run(trainer, alone, STEPS, is_writer=True, method=VIRTUAL[name])
    deepspeed_run(tmp_path, workers=2, stage=stage, method=VIRTUAL[name])
    assert_same_training(tmp_path, alone)


LAYERWISE = {
    "ia3": {"type": "ia3"},
    "bottleneck": {"type": "bottleneck", "placement": "houlsby"},
    "adalora": {"type": "adalora", "init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 2},
}


@pytest.mark.parametrize(
    ("name", "stage"),
    [("ia3", 2), ("ia3", 3), ("bottleneck", 2), ("bottleneck", 3), ("adalora", 0)],
)
def test_other_layerwise_methods_train_on_two_workers_as_in_one_process(
    name: str, stage: int, tmp_path: Path
) -> None:
    alone = tmp_path / "alone"
    trainer = Trainer(MultiAdapterModel(tiny_model()))
    run(trainer, alone, STEPS, is_writer=True, method=LAYERWISE[name])
    deepspeed_run(tmp_path, workers=2, stage=stage, method=LAYERWISE[name])
    assert_same_training(tmp_path, alone)


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("kind", ["pretrain", "dpo", "orpo", "kto", "reward"])
def test_texts_and_preferences_are_learned_by_two_workers_as_by_one(
    kind: str, stage: int, tmp_path: Path
) -> None:
    objective = {"type": kind}
    torch_run(tmp_path / "alone", objective=objective)
    deepspeed_run(tmp_path / "two", workers=2, stage=stage, objective=objective)
    # A head of nearly 0 leaves gradients of rounding size, which Adam makes as large as others.
    tolerance = 2e-4 if kind == "reward" else 1e-4
    assert_same_training(tmp_path / "two", tmp_path / "alone", tolerance)


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_two_workers_sample_and_learn_what_one_does(kind: str, stage: int, tmp_path: Path) -> None:
    objective = {
        "type": kind,
        "rewards": [{"metric": {"type": "length", "max_chars": 8}}],
        "group_size": 3,
        "max_new_tokens": 8,
        "num_iterations": 3,
    }
    torch_run(tmp_path / "alone", objective=objective)
    deepspeed_run(tmp_path / "two", workers=2, stage=stage, objective=objective)
    assert_same_training(tmp_path / "two", tmp_path / "alone")
