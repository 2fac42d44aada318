"""ORPO is TRL's, and the authors'."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from graft.data.records import TokenRow
from graft.engine.scoring import outputs_of
from graft.objectives.orpo import OrpoObjective
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
    rows: list[TokenRow], folder: Path, beta: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """TRL's loss, which is the mean over pairs where all chosen answers are equally long."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    trainer = make_trainer(ORPOTrainer, ORPOConfig, folder, beta=beta, reference={})
    batch = {}
    for name, answer in (("chosen", 1), ("rejected", 2)):
        whole = [torch.tensor(parts(row)[0] + parts(row)[answer]) for row in rows]
        unlearned = [len(parts(row)[0]) for row in rows]
        labels = [
            torch.cat([torch.full((start,), -100), ids[start:]])
            for ids, start in zip(whole, unlearned, strict=True)
        ]
        pad = torch.nn.utils.rnn.pad_sequence
        batch[f"{name}_input_ids"] = pad(whole, batch_first=True)
        batch[f"{name}_attention_mask"] = pad([torch.ones_like(w) for w in whole], batch_first=True)
        batch[f"{name}_labels"] = pad(labels, batch_first=True, padding_value=-100)
    loss, _ = trainer.get_batch_loss_metrics(trainer.model, batch)
    return loss, their_gradients(trainer.model, loss)


@pytest.mark.parametrize("beta", [0.1, 0.8])
def test_loss_and_gradients_are_trls_which_learns_the_prompt_too(
    beta: float, tmp_path: Path
) -> None:
    rows = [row._replace(is_supervised=[True] * 13) for row in make_pairs(5, even=True)]
    loss, gradients = trl_loss(rows, tmp_path, beta)
    assert_same(our_step(OrpoObjective(beta=beta, learns_prompt=True), rows), loss, gradients)


def test_of_uneven_pairs_it_is_the_mean_of_trls_loss_of_each(tmp_path: Path) -> None:
    rows = make_pairs(3)
    rows = [row._replace(is_supervised=[True] * len(row.input_ids)) for row in rows]
    each = [trl_loss([row], tmp_path / str(at), 0.3) for at, row in enumerate(rows)]
    gradients = {k: sum(g[k] for _, g in each) / len(rows) for k in each[0][1]}
    loss = sum(loss for loss, _ in each) / len(rows)
    assert_same(our_step(OrpoObjective(beta=0.3, learns_prompt=True), rows), loss, gradients)


def test_without_the_prompt_it_is_the_papers_sum_on_a_hand_worked_pair() -> None:
    row = TokenRow([5, 6, 10, 11, 20], [False, False, True, True, True], "p:1", [0, 0, 1, 1, 2])
    outputs = outputs_of([row], [[math.log(0.5), math.log(0.5), math.log(0.25)]], {})
    # Likelihoods a token 1/2 and 1/4: odds 1 and 1/3, so their ratio is 3.
    expected = math.log(2) - 0.2 * math.log(3 / 4)
    assert OrpoObjective(beta=0.2).loss(outputs).tolist() == pytest.approx([expected])
    assert OrpoObjective().figures(outputs)["log_odds_ratio"].tolist() == pytest.approx(
        [math.log(3)]
    )


def test_a_certain_answer_has_a_finite_loss_and_gradient() -> None:
    row = TokenRow([5, 10, 20], [False, True, True], "p:1", [0, 1, 2])
    outputs = outputs_of([row], [[0.0, -40.0]], {})
    outputs.logprobs_P.requires_grad_()
    loss = OrpoObjective().loss(outputs)
    loss.sum().backward()
    assert bool(loss.isfinite().all() and outputs.logprobs_P.grad.isfinite().all())
