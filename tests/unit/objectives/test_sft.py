"""SFT is TRL's, and log-probabilities are those of a naive loop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from graft.objectives.sft import SftObjective
from tests.unit.objectives._trl import (
    assert_same,
    make_pairs,
    make_trainer,
    our_step,
    peft_policy,
    their_gradients,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL's own making

ROWS = [
    pair.take(pair.branch_columns(1))._replace(branch=None, source=f"rows:{at}")
    for at, pair in enumerate(make_pairs(5))
]


def test_loss_and_gradients_are_trls(tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    texts = {"prompt": ["hi"] * 4, "completion": ["yes"] * 4}
    trainer = make_trainer(SFTTrainer, SFTConfig, tmp_path, reference={}, texts=texts)
    labels = [
        [t if m else -100 for t, m in zip(row.input_ids, row.is_supervised, strict=True)]
        for row in ROWS
    ]
    batch = trainer.data_collator(
        [{"input_ids": r.input_ids, "labels": own} for r, own in zip(ROWS, labels, strict=True)]
    )
    loss = trainer.compute_loss(trainer.model, dict(batch))
    assert_same(our_step(SftObjective(), ROWS), loss, their_gradients(trainer.model, loss))


def test_the_loss_is_a_naive_loops_over_the_answers_tokens() -> None:
    policy = peft_policy().eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for row in ROWS:
            logits = policy(input_ids=torch.tensor([row.input_ids])).logits[0]
            for at in range(1, len(row.input_ids)):
                if row.is_supervised[at]:
                    total -= float(logits[at - 1].log_softmax(0)[row.input_ids[at]])
                    count += 1
    assert our_step(SftObjective(), ROWS)[0].loss == pytest.approx(total / count, abs=1e-5)
