"""Several sources prepared together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from graft.core.errors import DataError
from graft.data.mixture import DataPart, prepare_parts
from graft.data.prepare import prepare_data
from graft.data.section import DataSection
from graft.data.template import ChatTemplate
from graft.objectives.kto import KtoObjective
from graft.objectives.pretrain import PretrainObjective
from graft.objectives.sft import SftObjective

Parts = list[DataPart[SftObjective | PretrainObjective]]


def write(path: Path, *rows: dict[str, str]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def chats(path: Path, *numbers: int) -> str:
    rows = [{"prompt": f"say {number}", "completion": str(number)} for number in numbers]
    return write(path, *rows)


def texts(path: Path, *numbers: int) -> str:
    return write(path, *({"text": f"number {number} is a number"} for number in numbers))


@pytest.fixture
def template(tokenizer: PreTrainedTokenizerFast) -> ChatTemplate:
    return ChatTemplate(tokenizer)


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    commands = DataSection(
        train=chats(tmp_path / "a.jsonl", *range(6)), eval=chats(tmp_path / "b.jsonl", 10, 11, 12)
    )
    wiki = DataSection(
        train=texts(tmp_path / "c.jsonl", *range(8)),
        eval=texts(tmp_path / "d.jsonl", 10),
        max_length=80,
    )
    return [
        DataPart(commands, SftObjective(), "commands", 0.7),
        DataPart(wiki, PretrainObjective(), "wiki", 0.3),
    ]


def test_each_part_is_prepared_as_if_alone_and_its_rows_know_it(
    parts: Parts, template: ChatTemplate
) -> None:
    prepared = prepare_parts(parts, template)
    for part in parts:
        alone = prepare_data(part.section, part.objective, template)
        for ours, theirs in (
            (prepared.train, alone.train),
            (prepared.eval, alone.eval),
            (prepared.prompts, alone.prompts),
        ):
            assert [row._replace(part="") for row in ours if row.part == part.name] == theirs
        assert prepared.proof.parts[part.name] == alone.proof
    assert any(row.branch for row in prepared.train)  # the texts are packed


def test_held_out_rows_take_turns(parts: Parts, template: ChatTemplate) -> None:
    prepared = prepare_parts(parts, template)
    assert [row.part for row in prepared.eval] == ["commands", "wiki", "commands", "commands"]
    assert [prompt.part for prompt in prepared.prompts] == ["commands"] * 3


def test_the_proof_counts_all_and_each(parts: Parts, template: ChatTemplate) -> None:
    prepared = prepare_parts(parts, template)
    proof = prepared.proof
    assert proof.train.num_examples == 14
    assert proof.train.num_rows == len(prepared.train)
    each = [own.train for own in proof.parts.values()]
    assert proof.train.num_tokens == sum(split.num_tokens for split in each)
    assert proof.train.tokens_per_row.max == max(split.tokens_per_row.max for split in each)
    assert proof.train.source == ", ".join(split.source for split in each)
    assert proof.eval is not None
    assert proof.eval.num_rows == 4
    assert proof.max_length == 1024
    names = ["train", "held out"]
    assert list(proof.splits) == [
        *names,
        *(f"{p} {n}" for p in ("commands", "wiki") for n in names),
    ]


def test_the_digest_names_rows_parts_and_lengths(parts: Parts, template: ChatTemplate) -> None:
    def digest(*changed: DataPart[SftObjective | PretrainObjective]) -> str:
        return prepare_parts(changed, template).proof.digest

    first, second = parts
    longer = second.section.model_copy(update={"max_length": 90})
    digests = {
        digest(first, second),
        digest(second, first),
        digest(first, second._replace(name="web")),
        digest(first, second._replace(section=longer)),
        digest(first),
    }
    assert len(digests) == 5
    assert digest(first, second) == digest(first, second._replace(weight=9.0))


def test_one_part_without_a_name_is_what_it_always_was(
    parts: Parts, template: ChatTemplate
) -> None:
    (first, _) = parts
    alone = prepare_data(first.section, first.objective, template)
    assert prepare_parts([first._replace(name="")], template) == alone


def test_what_one_source_lacks_another_may_have(tmp_path: Path, template: ChatTemplate) -> None:
    kto = KtoObjective()

    def thumbs(name: str, is_wanted: bool) -> DataPart[KtoObjective]:
        rows = [{"prompt": f"{name} {at}", "completion": "b", "label": is_wanted} for at in (1, 2)]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return DataPart(DataSection(train=str(path)), kto, name)

    prepared = prepare_parts([thumbs("up", True), thumbs("down", False)], template)
    assert [row.label for row in prepared.train] == [1, 1, 0, 0]
    with pytest.raises(DataError, match=r"up.jsonl, .*more.jsonl: all 4 answers are wanted"):
        prepare_parts([thumbs("up", True), thumbs("more", True)], template)


def test_a_row_held_out_by_one_source_and_learned_in_another_is_refused(
    parts: Parts, template: ChatTemplate, tmp_path: Path
) -> None:
    leaking = DataSection(train=chats(tmp_path / "leak.jsonl", 30, 11))
    with pytest.raises(DataError, match=r"1 held-out rows .* \(b\.jsonl:2 = leak\.jsonl:2\)"):
        prepare_parts([*parts, DataPart(leaking, SftObjective(), "more")], template)


def test_a_source_of_the_wrong_kind_is_refused_by_its_file(
    parts: Parts, template: ChatTemplate
) -> None:
    wrong = [part._replace(objective=SftObjective()) for part in parts]
    with pytest.raises(DataError, match=r"c\.jsonl:1: objective 'sft' learns from conversations"):
        prepare_parts(wrong, template)
