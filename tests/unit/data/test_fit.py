"""Rows with branches are measured, cut and proved answer by answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from graft.core.errors import DataError
from graft.data.fit import fit_row, require_right_mask
from graft.data.prepare import prepare_data
from graft.data.records import Message, TokenRow
from graft.data.section import DataSection
from graft.data.template import ChatTemplate
from graft.objectives._scored import scored_row
from graft.objectives.base import OBJECTIVES

PROMPT = (
    Message(role="user", content="dim the lamp"),
    Message(role="assistant", content="which one?"),
    Message(role="user", content="the one in the hall"),
)
ROW = TokenRow(
    [5, 6, 7, 10, 11, 12, 13, 20, 21],
    [False] * 3 + [True] * 6,
    "pairs:1",
    [0, 0, 0] + [1] * 4 + [2] * 2,
)


@pytest.fixture
def template(tokenizer: PreTrainedTokenizerFast) -> ChatTemplate:
    return ChatTemplate(tokenizer)


def section(max_length: int, on_overflow: str = "truncate") -> DataSection:
    return DataSection.model_validate(
        {"train": "pairs.jsonl", "max_length": max_length, "on_overflow": on_overflow}
    )


def test_each_answer_behind_the_prompt_is_the_conversation_it_ends(template: ChatTemplate) -> None:
    row = template.answers(PROMPT, ["done", "I will not do that"], source="pairs:1")
    assert row.num_branches == 2
    for branch, text in enumerate(["done", "I will not do that"], 1):
        whole = template.tokens([*PROMPT, Message(role="assistant", content=text)])
        found = row.take(row.branch_columns(branch))
        assert found.input_ids == whole.input_ids
        assert found.input_ids[-1] in template.stop_ids
        assert found.is_supervised[-1]
    prompt = template.prompt_ids(PROMPT)
    assert row.input_ids[: row.num_prompt_tokens] == prompt
    assert not any(row.is_supervised[: len(prompt)])  # the first of the two assistant's turns too


def test_what_counts_is_the_prompt_with_its_longest_answer(template: ChatTemplate) -> None:
    exact = ROW.take(ROW.branch_columns(1))
    assert len(exact.input_ids) == 7
    assert fit_row(ROW, section(8), template) is ROW
    long = ROW._replace(
        input_ids=[*ROW.input_ids, 22, 23, 24, 25],
        is_supervised=[*ROW.is_supervised, *[True] * 4],
        branch=[*ROW.branch, *[2] * 4],
    )
    with pytest.raises(DataError, match="pairs:1: the row has 9 tokens with its longest answer"):
        fit_row(long, section(8, "refuse"), template)


def test_a_pair_is_cut_answer_by_answer_and_its_prompt_stays_whole(template: ChatTemplate) -> None:
    long = template.answers(PROMPT, ["one two three four five", "six"], source="pairs:1")
    num_prompt = long.num_prompt_tokens
    cut = fit_row(long, section(num_prompt + 3), template)
    assert cut.input_ids[:num_prompt] == long.input_ids[:num_prompt]
    assert [cut.branch.count(k) for k in (0, 1, 2)] == [num_prompt, 3, 3]
    for branch in (1, 2):
        own = long.take(long.branch_columns(branch)).input_ids
        assert cut.take(cut.branch_columns(branch)).input_ids == own[: num_prompt + 3]


def test_a_short_answer_beside_one_that_is_cut_is_scored_once(template: ChatTemplate) -> None:
    pair = template.answers(PROMPT, ["one two three four five six seven", "x"], source="pairs:1")
    scored, num_prompt = scored_row(pair), pair.num_prompt_tokens
    short = scored.take(scored.branch_columns(2))
    room = len(short.input_ids) - num_prompt + 2
    cut = fit_row(scored, section(num_prompt + room), template)
    assert cut.branch.count(1) == room
    own = cut.take(cut.branch_columns(2))
    assert (own.input_ids, own.targets) == (short.input_ids, short.targets)


def test_a_cut_answer_is_still_scored_at_its_end(template: ChatTemplate) -> None:
    pair = template.answers(PROMPT, ["one two three four five", "six"], source="pairs:1")
    scored = scored_row(pair)
    num_prompt = pair.num_prompt_tokens
    cut = fit_row(scored, section(num_prompt + 4), template)
    require_right_mask(cut)
    assert [cut.branch.count(k) for k in (0, 1, 2)] == [num_prompt, 4, 4]
    for branch in (1, 2):
        own = cut.take(cut.branch_columns(branch))
        whole = pair.take(pair.branch_columns(branch)).input_ids
        assert own.input_ids[:-1] == whole[: num_prompt + 3]
        assert own.targets == [num_prompt + 3]


def test_a_prompt_that_leaves_no_room_is_refused_and_never_cut(template: ChatTemplate) -> None:
    long = template.answers(PROMPT, ["yes", "no"], source="pairs:1")
    with pytest.raises(DataError, match=r"pairs:1: the prompt alone has .* a prompt is never cut"):
        fit_row(long, section(long.num_prompt_tokens), template)


def test_answers_of_the_same_tokens_are_refused() -> None:
    same = ROW.take([0, 1, 2, 3, 4, 7, 8])._replace(input_ids=[5, 6, 7, 10, 11, 10, 11])
    with pytest.raises(DataError, match="pairs:1: two answers of the row are the same tokens"):
        require_right_mask(same)
    require_right_mask(ROW)


def test_a_row_without_a_prompt_is_refused() -> None:
    bare = ROW.take(list(range(3, 9)))
    with pytest.raises(DataError, match="the first token is supervised"):
        require_right_mask(bare)


def test_held_out_pairs_stand_ready_whatever_the_objective(
    tmp_path: Path, template: ChatTemplate
) -> None:
    for part, word in (("train", "lamp"), ("eval", "door")):
        pair = {"prompt": f"open the {word}", "chosen": "done", "rejected": "I cannot"}
        (tmp_path / f"{part}.jsonl").write_text(json.dumps(pair) + "\n", encoding="utf-8")
    paths = DataSection(
        train=str(tmp_path / "train.jsonl"), eval=str(tmp_path / "eval.jsonl"), max_length=64
    )
    for name in ("dpo", "kto"):
        prepared = prepare_data(paths, OBJECTIVES.build(name), template)
        (pair_row,) = prepared.preferences
        prompt = [Message(role="user", content="open the door")]
        assert pair_row == template.answers(prompt, ["done", "I cannot"], source="eval.jsonl:1")
        assert [p.reference for p in prepared.prompts] == ["done"]


def test_labels_of_one_kind_are_refused_when_the_data_is_read(
    tmp_path: Path, template: ChatTemplate
) -> None:
    rows = [{"prompt": f"a {at}", "completion": "b", "label": True} for at in range(3)]
    file = tmp_path / "thumbs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(DataError, match=r"thumbs.jsonl: all 3 answers are wanted"):
        prepare_data(DataSection(train=str(file)), OBJECTIVES.build("kto"), template)
