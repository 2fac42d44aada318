"""DPO in all its variants is TRL's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from graft.data.records import TokenRow
from graft.objectives.dpo import DpoObjective
from tests.unit.objectives._trl import (
    assert_same,
    make_pairs,
    make_trainer,
    our_step,
    parts,
    their_gradients,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL's own making


def trl_loss(
    rows: list[TokenRow], folder: Path, **settings: Any
) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, list[float]]]:
    from trl import DPOConfig, DPOTrainer

    trainer = make_trainer(DPOTrainer, DPOConfig, folder, **settings)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    batch = trainer.data_collator([dict(zip(names, parts(row), strict=True)) for row in rows])
    loss = trainer.compute_loss(trainer.model, dict(batch))
    return loss, their_gradients(trainer.model, loss), trainer._metrics["train"]


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo"])
@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_loss_gradients_and_figures_are_trls(loss_type: Any, beta: float, tmp_path: Path) -> None:
    rows = make_pairs(5)
    loss, gradients, metrics = trl_loss(rows, tmp_path, loss_type=[loss_type], beta=beta)
    ours = our_step(DpoObjective(loss_type=loss_type, beta=beta), rows)
    assert_same(ours, loss, gradients)
    figures = ours[0].figures
    for own, theirs in (
        ("chosen_reward", "rewards/chosen"),
        ("rejected_reward", "rewards/rejected"),
        ("reward_margin", "rewards/margins"),
        ("reward_accuracy", "rewards/accuracies"),
    ):
        assert figures[own] == pytest.approx(metrics[theirs][0], abs=1e-5)
