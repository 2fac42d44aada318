"""KTO is TRL's, however the step is divided."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from graft.core.errors import DataError
from graft.data.records import Example, Message, TokenRow
from graft.data.template import ChatTemplate
from graft.objectives.kto import KtoObjective
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

TEXTS: dict[str, Any] = {
    "prompt": ["hi"] * 4,
    "completion": ["yes", "no"] * 2,
    "label": [True, False] * 2,
}
TEMPLATE = ChatTemplate(tiny_tokenizer())


def make_answers(num_rows: int, num_wanted: int) -> list[TokenRow]:
    """Random prompts with one answer each, the first ones wanted."""
    pairs = make_pairs(num_rows, seed=1)
    return [
        pair.take(pair.branch_columns(1))._replace(label=float(at < num_wanted))
        for at, pair in enumerate(pairs)
    ]


def trl_loss(
    rows: list[TokenRow], folder: Path, **settings: Any
) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, list[float]]]:
    from trl import KTOConfig, KTOTrainer

    trainer = make_trainer(KTOTrainer, KTOConfig, folder, texts=TEXTS, **settings)
    names = ("prompt_ids", "completion_ids")
    examples = [dict(zip(names, parts(row), strict=True)) for row in rows]
    for row, example, before in zip(rows, examples, [examples[-1], *examples], strict=False):
        example |= {"label": row.label == 1, "KL_completion_ids": before["completion_ids"]}
    batch = trainer.data_collator(examples)
    loss = trainer.compute_loss(trainer.model, dict(batch))
    return loss, their_gradients(trainer.model, loss), trainer._metrics["train"]


@pytest.mark.parametrize(("beta", "desirable", "undesirable"), [(0.1, 1.0, 1.0), (0.5, 1.3, 0.8)])
def test_loss_gradients_and_figures_are_trls(
    beta: float, desirable: float, undesirable: float, tmp_path: Path
) -> None:
    rows = make_answers(6, num_wanted=2)
    weights = {"desirable_weight": desirable, "undesirable_weight": undesirable}
    loss, gradients, metrics = trl_loss(rows, tmp_path, beta=beta, **weights)
    ours = our_step(KtoObjective(beta=beta, **weights), rows)
    assert_same(ours, loss, gradients)
    for own, theirs in (
        ("kl", "kl"),
        ("chosen_reward", "rewards/chosen"),
        ("rejected_reward", "rewards/rejected"),
    ):
        assert ours[0].figures[own] == pytest.approx(metrics[theirs][0], abs=1e-5)


def test_the_estimated_divergence_is_not_0_in_what_was_compared(tmp_path: Path) -> None:
    kls = [our_step(KtoObjective(), make_answers(6, n))[0].figures["kl"] for n in (2, 5)]
    assert kls[0] == kls[1] > 1e-3  # labels have no part in it


def test_micro_batches_do_not_change_the_common_zero() -> None:
    rows = make_answers(6, num_wanted=3)
    whole, small = (our_step(KtoObjective(), rows, max_tokens=n) for n in (1000, 10))
    assert whole[0].loss == pytest.approx(small[0].loss, abs=1e-7)
    for key, gradient in whole[1].items():
        torch.testing.assert_close(small[1][key], gradient, rtol=0, atol=1e-6)


def test_each_prompt_is_probed_with_the_answer_before() -> None:
    rows = [
        TokenRow([1, 2, 3, 4, 5], [False] * 4 + [True], "a", [0] * 4 + [1], 1.0),
        TokenRow([6, 7, 8, 9], [False] + [True] * 3, "b", [0] + [1] * 3, 0.0),
    ]
    first, second = KtoObjective().probe_rows(rows)
    assert first.input_ids == [1, 2, 3, 4, 7, 8, 9]
    assert second.input_ids == [6, 5]
    assert [row.targets for row in (first, second)] == [[4, 5, 6], [1]]


def test_a_pair_gives_a_wanted_and_an_unwanted_row() -> None:
    asked = (Message(role="user", content="lamp?"),)
    pair = Example(source="p:1", prompt=asked, chosen="on", rejected="off")
    wanted, unwanted = KtoObjective().rows(pair, TEMPLATE)
    assert (wanted.label, unwanted.label) == (1.0, 0.0)
    single = Example(source="p:1", prompt=asked, answer="off", is_wanted=False)
    assert KtoObjective().rows(single, TEMPLATE) == [unwanted]


def test_labels_of_one_kind_are_refused() -> None:
    rows = make_answers(4, num_wanted=4)
    with pytest.raises(DataError, match=r"t.jsonl: all 4 answers are wanted"):
        KtoObjective().require_rows(rows, "t.jsonl")
    with pytest.raises(DataError, match="all 1 answers are unwanted"):
        KtoObjective().require_rows([rows[0]._replace(label=0.0)], "t.jsonl")
    KtoObjective().require_rows(make_answers(4, num_wanted=1), "t.jsonl")


def test_a_pair_of_the_same_tokens_is_refused() -> None:
    asked = (Message(role="user", content="lamp?"),)
    pairs = [
        Example(source="p:1", prompt=asked, chosen="on", rejected="off"),
        Example(source="p:2", prompt=asked, chosen="on", rejected="on"),
    ]
    rows = [row for pair in pairs for row in KtoObjective().rows(pair, TEMPLATE)]
    with pytest.raises(DataError, match="p:2: both answers of the pair are the same tokens"):
        KtoObjective().require_rows(rows, "t.jsonl")
    KtoObjective().require_rows(rows[:2], "t.jsonl")


def test_rows_without_a_label_are_refused_in_words() -> None:
    talk = (Message(role="user", content="a"), Message(role="assistant", content="b"))
    with pytest.raises(DataError, match="t:1: objective 'kto' learns from answers with a label"):
        KtoObjective().rows(Example(source="t:1", messages=talk), TEMPLATE)
