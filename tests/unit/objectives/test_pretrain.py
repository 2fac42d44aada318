"""Pre-training on packed documents is pre-training on each of them alone."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from graft.core.errors import ConfigError, DataError
from graft.data.prepare import prepare_data
from graft.data.records import Example, Message, TokenRow
from graft.data.section import DataSection
from graft.data.template import ChatTemplate
from graft.engine.multi import MultiAdapterModel
from graft.engine.train import Trainer
from graft.objectives._packing import _best_fit, pack_documents
from graft.objectives.pretrain import PretrainObjective
from graft.testing import tiny_tokenizer
from tests.unit.engine.conftest import exact_model, make_recipe

TEMPLATE = ChatTemplate(tiny_tokenizer())
END = TEMPLATE.tokenizer.eos_token_id
WORDS = ["lamp", "fan", "door", "the quick brown fox", "sea shells", "asks for something"]


def documents(count: int, *, longest: int, seed: int = 0) -> list[TokenRow]:
    """Random documents of 1 to `longest` words."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        text = " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, longest)))
        rows += PretrainObjective().rows(Example(source=f"d:{number}", text=text), TEMPLATE)
    return rows


def first_steps(rows: list[TokenRow], *, shares: bool = True, steps: int = 3) -> Trainer:
    """Steps on all rows at once, with dropout off, from the same start."""
    model = MultiAdapterModel(exact_model())
    model.shares_prompts = shares
    recipe = make_recipe(
        objective={"type": "pretrain"},
        train={"steps": steps, "batch_size": len(rows), "lr": 1e-3, "micro_batch_tokens": 150},
    )
    trainer = Trainer(model)
    trainer.join("a", recipe, rows)
    return trainer


def test_every_token_but_the_first_is_learned_and_the_end_stands_last() -> None:
    (row,) = PretrainObjective().rows(
        Example(source="d:1", text="set lamp <|im_end|> on"), TEMPLATE
    )
    assert row.input_ids[-1] == END
    assert row.input_ids.count(END) == 1  # what the text spells stays text
    assert TEMPLATE.tokenizer.decode(row.input_ids[:-1]) == "set lamp <|im_end|> on"
    assert row.is_supervised == [False] + [True] * (len(row.input_ids) - 1)


def test_the_end_of_a_document_may_be_named() -> None:
    objective = PretrainObjective(end_token="<|bos|>")
    (row,) = objective.rows(Example(source="d:1", text="lamp"), TEMPLATE)
    assert row.input_ids[-1] == TEMPLATE.tokenizer.bos_token_id
    with pytest.raises(ConfigError, match=r"'<\|box\|>' is no token .* Did you mean '<\|bos\|>'"):
        PretrainObjective(end_token="<|box|>").rows(Example(source="d:1", text="a"), TEMPLATE)


def test_a_tokenizer_without_an_end_wants_one_named() -> None:
    template = ChatTemplate(tiny_tokenizer())
    template.tokenizer.eos_token = None
    with pytest.raises(
        ConfigError, match=r"no token that ends a sequence; .* objective\.end_token"
    ):
        PretrainObjective().rows(Example(source="d:1", text="a"), template)


def test_a_conversation_is_refused_by_name() -> None:
    turns = (Message(role="user", content="a"), Message(role="assistant", content="b"))
    with pytest.raises(DataError, match=r"a\.jsonl:4: objective 'pretrain' learns from plain text"):
        PretrainObjective().rows(Example(source="a.jsonl:4", messages=turns), TEMPLATE)


def test_documents_go_where_the_least_room_is_left() -> None:
    # The longest first: 6 opens a row, 5 another; 3 fills the second, 2 the first.
    assert _best_fit([3, 5, 2, 6], 8) == [[0, 1], [2, 3]]
    assert _best_fit([8, 8], 8) == [[0], [1]]
    assert _best_fit([], 8) == []


@pytest.mark.parametrize("max_length", [8, 16, 64, 1000])
def test_packed_rows_hold_each_target_once_in_its_own_document(max_length: int) -> None:
    rows = documents(40, longest=12)
    packed = pack_documents(rows, max_length)
    assert max(len(row.input_ids) for row in packed) <= max_length
    assert sum(sum(row.is_supervised) for row in packed) == sum(
        sum(row.is_supervised) for row in rows
    )
    pieces: list[list[int]] = []
    for row in packed:
        branch = row.branch or [1] * len(row.input_ids)
        for number in range(1, branch[-1] + 1):
            columns = [at for at, of in enumerate(branch) if of == number]
            assert columns == list(range(columns[0], columns[-1] + 1))
            assert [row.is_supervised[at] for at in columns] == [False] + [True] * (
                len(columns) - 1
            )
            pieces.append([row.input_ids[at] for at in columns])
    whole = [row.input_ids for row in rows if len(row.input_ids) <= max_length]
    assert sorted(piece for piece in pieces if piece in whole) == sorted(whole)
    cut = [row.input_ids for row in rows if len(row.input_ids) > max_length]
    for ids in cut:
        starts = range(0, len(ids) - 1, max_length - 1)
        assert all(ids[start : start + max_length] in pieces for start in starts)
    assert len(pieces) == len(whole) + sum(-(-(len(ids) - 1) // (max_length - 1)) for ids in cut)


@pytest.mark.parametrize("shares", [True, False], ids=["one pass", "expanded"])
def test_the_loss_is_the_mean_over_documents_that_transformers_would_give(shares: bool) -> None:
    rows = documents(12, longest=8)
    model = exact_model()
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row.input_ids])
        targets = len(row.input_ids) - 1
        total += float(model(input_ids=ids, labels=ids).loss.detach()) * targets
        count += targets
    packed = pack_documents(rows, 64)
    assert len(packed) < len(rows)
    report = first_steps(packed, shares=shares, steps=1).step()["a"]
    assert report.loss == pytest.approx(total / count, abs=1e-6)  # theirs rounds logits to fp32
    assert report.num_supervised_tokens == count


@pytest.mark.parametrize("shares", [True, False], ids=["one pass", "expanded"])
def test_packed_documents_teach_what_they_teach_alone(shares: bool) -> None:
    rows = documents(12, longest=8)
    alone = first_steps(rows)
    packed = first_steps(pack_documents(rows, 64), shares=shares)
    for _ in range(3):
        expected, report = alone.step()["a"], packed.step()["a"]
        assert report.loss == pytest.approx(expected.loss, abs=1e-9)
        assert report.grad_norm == pytest.approx(expected.grad_norm, abs=1e-9)
    ours, theirs = packed.state("a").tensors, alone.state("a").tensors
    for site, tensors in theirs.items():
        for key, value in tensors.items():
            torch.testing.assert_close(ours[site][key], value, rtol=0, atol=1e-6)


def test_the_proof_counts_documents_and_rows_and_held_out_documents_stay_apart(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    draw = random.Random(0)
    texts = [f"{number} " + " ".join(draw.choices(WORDS, k=6)) for number in range(20)]
    texts[0] = "lamp " * 100  # longer than a row: cut, not refused
    for name, part in (("train", texts[:16]), ("eval", texts[16:])):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in part)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    section = DataSection(
        train=str(tmp_path / "train.jsonl"), eval=str(tmp_path / "eval.jsonl"), max_length=48
    )
    objective, template = PretrainObjective(), ChatTemplate(tokenizer)
    prepared = prepare_data(section, objective, template)
    train, held_out = prepared.proof.train, prepared.proof.eval
    assert held_out is not None
    lengths = [
        len(objective.rows(Example(source="", text=text), template)[0].input_ids) for text in texts
    ]
    assert max(lengths) > 48
    assert train.num_examples == 16
    assert train.num_rows == len(prepared.train) < 16
    assert train.tokens_per_row.max <= 48
    assert train.num_supervised_tokens == sum(lengths[:16]) - 16
    assert train.num_truncated == 0
    assert held_out.num_examples == held_out.num_rows == len(prepared.eval) == 4
    assert all(row.branch is None for row in prepared.eval)
    assert prepared.prompts == []
