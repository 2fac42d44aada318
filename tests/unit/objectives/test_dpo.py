"""DPO in all its variants is TRL's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from graft.core.errors import DataError
from graft.data.records import Example, Message, TokenRow
from graft.data.template import ChatTemplate
from graft.engine.scoring import outputs_of
from graft.objectives.base import REFERENCE
from graft.objectives.dpo import DpoObjective
from graft.testing import tiny_tokenizer
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


def test_label_smoothing_is_trls_where_its_pairs_stand_alone(tmp_path: Path) -> None:
    # TRL smooths in `aot`, which is the sigmoid loss with margins sorted over the batch.
    for index, row in enumerate(make_pairs(3)):
        folder = tmp_path / str(index)
        loss, gradients, _ = trl_loss([row], folder, loss_type=["aot"], label_smoothing=0.2)
        assert_same(our_step(DpoObjective(label_smoothing=0.2), [row]), loss, gradients)


def test_cross_entropy_of_the_chosen_answer_is_trls_where_its_pairs_stand_alone(
    tmp_path: Path,
) -> None:
    # TRL takes the mean over all tokens of a batch; here pairs count alike.
    weights = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.6]}
    for index, row in enumerate(make_pairs(3)):
        loss, gradients, _ = trl_loss([row], tmp_path / str(index), **weights)
        assert_same(our_step(DpoObjective(sft_weight=0.6), [row]), loss, gradients)


def test_at_the_start_the_margin_is_0_and_the_loss_is_known() -> None:
    rows = make_pairs(2)
    outputs = outputs_of(rows, flat(rows, -1.0), {REFERENCE: flat(rows, -1.0)})
    for objective, expected in (
        (DpoObjective(), math.log(2)),
        (DpoObjective(loss_type="hinge"), 1.0),
        (DpoObjective(loss_type="ipo", beta=0.25), 4.0),
        (DpoObjective(label_smoothing=0.3), math.log(2)),
    ):
        assert objective.loss(outputs).tolist() == pytest.approx([expected] * 2)


def flat(rows: list[TokenRow], value: float) -> list[list[float]]:
    return [[value] * len(row.targets) for row in rows]


def test_no_target_is_in_the_prompt_and_the_end_of_the_turn_is_one() -> None:
    template = ChatTemplate(tiny_tokenizer())
    asked = (Message(role="user", content="lamp?"),)
    example = Example(source="p:1", prompt=asked, chosen="on", rejected="off")
    (row,) = DpoObjective().rows(example, template)
    prompt, *answers = parts(row)
    assert row.targets == list(range(len(prompt), len(row.input_ids)))
    for answer, text in zip(answers, ("on", "off"), strict=True):
        assert answer[-1] in template.stop_ids
        assert template.tokenizer.decode(answer[:-1]) == text


def test_rows_that_are_no_pairs_are_refused_in_words() -> None:
    template = ChatTemplate(tiny_tokenizer())
    talk = (Message(role="user", content="a"), Message(role="assistant", content="b"))
    with pytest.raises(DataError, match=r"t:1: objective 'dpo' learns from pairs of answers"):
        DpoObjective().rows(Example(source="t:1", messages=talk), template)


def test_label_smoothing_without_a_place_is_refused() -> None:
    with pytest.raises(ValidationError, match="label_smoothing has no meaning with loss_type ipo"):
        DpoObjective(loss_type="ipo", label_smoothing=0.1)
