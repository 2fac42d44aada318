"""Every format read and every bad row refused by file, line and field."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from graft.core.errors import DataError
from graft.data.formats import load_examples

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "ho"}
SYSTEM = {"role": "system", "content": "be brief"}

SAME_ROW: dict[str, dict[str, Any]] = {
    "messages": {"messages": [SYSTEM, USER, ASSISTANT], "id": 3},
    "alpaca": {"instruction": "hi", "input": "", "output": "ho", "system": "be brief"},
    "sharegpt": {
        "conversations": [
            {"from": "system", "value": "be brief"},
            {"from": "human", "value": "hi"},
            {"from": "gpt", "value": "ho"},
        ]
    },
    "prompt_completion": {"prompt": [SYSTEM, USER], "completion": "ho"},
}


def write_jsonl(path: Path, *rows: Any) -> str:
    """Writes rows and returns the path as a recipe would name it."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("format", SAME_ROW)
def test_all_formats_of_one_conversation_are_one_example(format: str, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", SAME_ROW[format])
    expected = load_examples(write_jsonl(tmp_path / "m.jsonl", SAME_ROW["messages"]), "messages")
    for asked in (format, "auto"):
        (example,) = load_examples(source, asked)
        assert example.messages == expected[0].messages
        assert example.source == "rows.jsonl:1"


def test_preference_rows_hold_prompt_chosen_and_rejected(tmp_path: Path) -> None:
    explicit = {"prompt": "hi", "chosen": "ho", "rejected": "no"}
    implicit = {
        "chosen": [USER, ASSISTANT],
        "rejected": [USER, {"role": "assistant", "content": "no"}],
    }
    for row in (explicit, implicit):
        (example,) = load_examples(write_jsonl(tmp_path / "p.jsonl", row), "auto")
        assert [turn.content for turn in example.prompt] == ["hi"]
        assert (example.chosen, example.rejected) == ("ho", "no")


def test_a_prompt_may_stand_beside_the_whole_conversations(tmp_path: Path) -> None:
    row = {
        "prompt": "hi",
        "chosen": [SYSTEM, USER, ASSISTANT],
        "rejected": [SYSTEM, USER, {"role": "assistant", "content": "no"}],
    }
    (example,) = load_examples(write_jsonl(tmp_path / "p.jsonl", row), "preference")
    assert [turn.content for turn in example.prompt] == ["be brief", "hi"]
    assert (example.chosen, example.rejected) == ("ho", "no")


@pytest.mark.parametrize(("label", "is_wanted"), [(True, True), (0, False), ("False", False)])
def test_unpaired_rows_hold_an_answer_and_whether_it_is_wanted(
    label: object, is_wanted: bool, tmp_path: Path
) -> None:
    row = {"prompt": [SYSTEM, USER], "completion": [ASSISTANT], "label": label}
    for asked in ("unpaired", "auto"):
        (example,) = load_examples(write_jsonl(tmp_path / "u.jsonl", row), asked)
        assert [turn.content for turn in example.prompt] == ["be brief", "hi"]
        assert (example.answer, example.is_wanted) == ("ho", is_wanted)
        assert not example.messages


def test_a_label_that_is_no_yes_or_no_does_not_make_a_row_unpaired(tmp_path: Path) -> None:
    row = {"prompt": "hi", "completion": "ho", "label": "greeting"}
    source = write_jsonl(tmp_path / "l.jsonl", row)
    assert load_examples(source, "auto")[0].messages
    with pytest.raises(DataError, match=r"l.jsonl:1: label must say .* not 'greeting'"):
        load_examples(source, "unpaired")


def test_alpaca_history_and_input_become_turns(tmp_path: Path) -> None:
    row = {"instruction": "do", "input": "this", "output": "ok", "history": [["a", "b"]]}
    (example,) = load_examples(write_jsonl(tmp_path / "a.jsonl", row), "alpaca")
    assert [turn.content for turn in example.messages] == ["a", "b", "do\nthis", "ok"]


def test_every_kind_of_file_gives_the_same_examples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": f'say "{i}",\nplease', "completion": str(i)} for i in range(3)]
    sources = [write_jsonl(tmp_path / "rows.jsonl", *rows)]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    with (tmp_path / "rows.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(rows)
        file.write("\r\n")  # as some editors end it
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "hub"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", *rows)
    sources += [str(tmp_path / f"rows.{kind}") for kind in ("json", "csv", "parquet")]
    contents = [
        [e.messages for e in load_examples(source, "auto")]
        for source in [*sources, f"hub:{folder}:train"]
    ]
    assert all(content == contents[0] for content in contents)
    assert len(contents[0]) == 3


def test_a_field_of_a_csv_file_may_hold_any_character(tmp_path: Path) -> None:
    odd = "line\u2028separator\x0bform\x0cfeed\x85next"
    path = tmp_path / "rows.csv"
    path.write_text(f"prompt,completion\r\n{odd},ok\r\nb,c\r\n", encoding="utf-8", newline="")
    first, second = load_examples(str(path), "auto")
    assert first.messages[0].content == odd
    assert second.source == "rows.csv:3"


def test_a_system_message_is_put_before_rows_that_have_none(tmp_path: Path) -> None:
    rows = ({"messages": [USER, ASSISTANT]}, {"messages": [SYSTEM, USER, ASSISTANT]})
    source = write_jsonl(tmp_path / "rows.jsonl", *rows)
    first, second = load_examples(source, "messages", system="own")
    assert first.messages[0].content == "own"
    assert second.messages[0].content == "be brief"


def test_a_prompt_without_an_answer_is_a_row_of_its_own_kind(tmp_path: Path) -> None:
    rows = ({"prompt": "asks"}, {"prompt": [SYSTEM, USER]})
    first, second = load_examples(write_jsonl(tmp_path / "rows.jsonl", *rows), "auto")
    assert [(turn.role, turn.content) for turn in first.prompt] == [("user", "asks")]
    assert [turn.role for turn in second.prompt] == ["system", "user"]
    assert not first.messages
    assert first.chosen is first.answer is first.text is None


def test_line_seven_malformed_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = json.dumps({"messages": [USER, ASSISTANT]})
    path.write_text("\n".join([good] * 6 + [good[:-1], good]), encoding="utf-8")
    with pytest.raises(DataError, match=r"rows\.jsonl:7: malformed JSON at column \d+"):
        load_examples(str(path), "messages")


BAD_ROWS: list[tuple[str, Any, str]] = [
    ("messages", [1], "a row is a JSON object"),
    ("messages", {"messages": []}, "at least one turn"),
    ("messages", {"messages": "hi"}, "must be a list"),
    ("messages", {"messages": [USER]}, "no assistant turn"),
    ("messages", {"messages": [ASSISTANT, USER, ASSISTANT]}, "speaks before anybody"),
    ("messages", {"messages": [USER, ASSISTANT, USER]}, "last turn is the user's"),
    ("messages", {"messages": [USER, SYSTEM, ASSISTANT]}, "must stand first"),
    ("messages", {"messages": [{"role": "usr", "content": "a"}]}, "Did you mean 'user'"),
    ("messages", {"messages": [{"roles": "user", "content": "a"}]}, "has no 'role'"),
    ("messages", {"messages": [{"role": "user", "content": " "}]}, "content is empty"),
    ("messages", {"messages": [{"role": "user", "content": None}]}, "not null"),
    ("messages", {"messages": [{"role": "user", "content": [1]}]}, "must be text, not list"),
    ("messages", {"messages": [{"role": "user", "content": "a\0b"}]}, "null character"),
    ("messages", {"messages": [{"role": "user", "content": "a\ud800"}]}, "surrogate"),
    ("messages", {"messages": [{**USER, "tool_calls": [{}]}]}, "tool_calls"),
    ("messages", {"messages": [USER, {**ASSISTANT, "weight": 0}]}, "weight 0 is not supported"),
    ("messages", {"mesages": [USER, ASSISTANT]}, "Did you mean 'mesages'"),
    ("messages", SAME_ROW["alpaca"], "looks like 'alpaca'"),
    ("alpaca", {"instruction": "a"}, "needs 'output'"),
    ("sharegpt", {"conversations": [{"from": "humn", "value": "a"}]}, "Did you mean 'human'"),
    ("sharegpt", {"conversations": [{"role": "human"}]}, "needs the keys 'from' and 'value'"),
    ("preference", {"prompt": "a", "chosen": "b", "rejected": "b"}, "are equal"),
    ("preference", {"prompt": "a", "chosen": "b"}, "needs 'rejected'"),
    ("preference", {"chosen": "b", "rejected": "c"}, "without 'prompt'"),
    ("preference", {"prompt": "a", "chosen": "b", "rejected": None}, "'rejected' is null"),
    ("preference", {"prompt": "a", "chosen": " ", "rejected": "c"}, "chosen: the content is empty"),
    ("preference", {"prompt": "", "chosen": "b", "rejected": "c"}, "prompt: the content is empty"),
    ("preference", {"prompt": "a", "chosen": [USER], "rejected": "c"}, "an assistant turn"),
    ("preference", {"prompt": 5, "chosen": "b", "rejected": "c"}, "text or a list of turns"),
    ("preference", {"chosen": [USER, ASSISTANT], "rejected": [SYSTEM, ASSISTANT]}, "differ"),
    (
        "preference",
        {"prompt": "a", "chosen": [USER, ASSISTANT], "rejected": [USER, SYSTEM]},
        "prompt is not what chosen and rejected reply to",
    ),
    ("unpaired", {"prompt": "a", "completion": [ASSISTANT, ASSISTANT], "label": True}, "one"),
    ("prompts", {"prompt": [USER, ASSISTANT]}, "ends with the assistant's turn"),
    ("prompts", {"prompt": [SYSTEM]}, "speaks before anybody"),
    ("text", {"text": ""}, "content is empty"),
    ("auto", {"question": "a"}, "no known format has the keys 'question'"),
]


@pytest.mark.parametrize(("format", "row", "words"), BAD_ROWS)
def test_a_bad_row_is_refused_with_its_line(
    format: str, row: Any, words: str, tmp_path: Path
) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", row)
    with pytest.raises(DataError, match=words) as caught:
        load_examples(source, format)
    assert str(caught.value).startswith("rows.jsonl:1")


BAD_FILES: list[tuple[str, bytes, str]] = [
    ("rows.jsonl", b"", "holds no rows"),
    ("rows.jsonl", b"\n  \n", "holds no rows"),
    ("rows.jsonl", b'{"text": "a"}\n\xff\n', "rows.jsonl:2: byte 0 is no UTF-8"),
    ("rows.json", b'{"text": "a"}', "a list of rows is expected"),
    ("rows.json", b'[{"text": "a"},\n{]', "malformed JSON at line 2"),
    ("rows.json", b"[" * 100_000, "nested too deeply"),
    ("rows.csv", b"prompt,completion\na,b,c\n", "rows.csv:2: 3 fields"),
    ("rows.csv", b'prompt,completion\n"a,b\n', "malformed CSV"),
    ("rows.jsonl", b'{"text": ' + b"1" * 5000 + b"}\n", "rows.jsonl:1: a number has more digits"),
    ("rows.csv", b"text\n" + b"a" * 140_000 + b"\n", "rows.csv:2: a field .* at most 131,072 char"),
    ("rows.parquet", b"PAR1 no", "no readable Parquet"),
    ("rows.xlsx", b"", "no known kind"),
]


@pytest.mark.parametrize(("name", "content", "words"), BAD_FILES)
def test_a_bad_file_is_refused_in_words(
    name: str, content: bytes, words: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        load_examples(str(tmp_path / name), "auto")


def test_a_missing_file_names_its_nearest_neighbour(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", {"text": "a"})
    with pytest.raises(DataError, match=r"does not exist. Did you mean 'train.jsonl'"):
        load_examples(str(tmp_path / "trian.jsonl"), "auto")


def test_a_folder_in_a_files_place_is_told_apart(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", {"text": "a"})
    with pytest.raises(DataError, match=r"is a folder, not a data file; it holds train\.jsonl"):
        load_examples(str(tmp_path), "auto")


def test_a_null_in_a_later_row_is_named(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", {"text": "a"}, {"text": None})
    with pytest.raises(DataError, match=r"^rows\.jsonl:2: 'text' is null; format 'text' needs"):
        load_examples(source, "auto")
