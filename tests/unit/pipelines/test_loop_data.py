"""The rows of a renewal: who joins whom, and who must not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from graft.core.errors import ConfigError, DataError
from graft.data import load_examples
from graft.data.section import DataSection
from graft.pipelines.renewal_data import compose
from graft.recipe.operation import LoopSection


def row(question: str) -> dict[str, Any]:
    """A conversation of two turns."""
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": f"yes, {question}"},
        ]
    }


def write(path: Path, questions: list[str]) -> str:
    """Writes rows as JSON lines."""
    path.write_text("".join(json.dumps(row(q)) + "\n" for q in questions), encoding="utf-8")
    return str(path)


def sections(folder: Path, **loop: Any) -> tuple[DataSection, LoopSection]:
    """40 new rows against 100 old ones, 10 of each to judge by."""
    data = DataSection(
        train=write(folder / "train.jsonl", [f"old {i}" for i in range(100)]),
        eval=write(folder / "eval.jsonl", [f"old {i}" for i in range(200, 210)]),
    )
    given = {
        "feedback": write(folder / "feedback.jsonl", [f"new {i}" for i in range(40)]),
        "feedback_eval": write(folder / "feval.jsonl", [f"new {i}" for i in range(200, 210)]),
    }
    return data, LoopSection.model_validate(given | loop)


def questions(file: str) -> list[str]:
    """What the rows of a composed file ask."""
    return [example.messages[0].content for example in load_examples(file, "auto")]


@pytest.mark.parametrize(("fraction", "num_old"), [(0.5, 40), (0.0, 0), (0.2, 10), (0.9, 100)])
def test_old_rows_join_in_the_share_asked_for_and_no_row_is_on_both_sides(
    tmp_path: Path, fraction: float, num_old: int
) -> None:
    data, loop = sections(tmp_path, replay_fraction=fraction)
    made = compose(data, loop, tmp_path / "renewal", seed=1)
    train, search = questions(made.train), questions(made.search)
    assert len(train) == made.num_new + made.num_old
    assert sum(q.startswith("old") for q in train + search) == num_old
    assert sum(q.startswith("new") for q in train + search) == 40
    assert sum(q.startswith("new") for q in search) == 5
    assert made.num_search == len(search)
    assert not set(train) & set(search)


def test_the_same_inputs_give_the_same_files_another_seed_others(tmp_path: Path) -> None:
    data, loop = sections(tmp_path)
    first, again = (compose(data, loop, tmp_path / n, seed=1) for n in ("a", "b"))
    other = compose(data, loop, tmp_path / "c", seed=2)
    assert first.sha256 == again.sha256 != other.sha256


def test_the_champions_own_rows_are_replayed_once_and_gate_rows_never(tmp_path: Path) -> None:
    data, loop = sections(tmp_path, replay_fraction=0.95)
    older = write(tmp_path / "older.jsonl", ["old 5", "older", "old 203", "new 201"])
    sources = [DataSection(train=train) for train in (older, str(tmp_path / "gone"))]
    made = compose(data, loop, tmp_path / "renewal", seed=1, older=sources)
    seen = questions(made.train) + questions(made.search)
    assert len(seen) == len(set(seen)) == 40 + 101
    assert "older" in seen
    assert not {"old 203", "new 201"} & set(seen)


def test_an_agreed_system_message_is_kept_in_the_rows(tmp_path: Path) -> None:
    data, loop = sections(tmp_path)
    made = compose(
        data.model_copy(update={"system": "Be brief."}), loop, tmp_path / "renewal", seed=1
    )
    first = load_examples(made.train, "auto")[0]
    assert [turn.role for turn in first.messages] == ["system", "user", "assistant"]


def test_what_the_champion_learned_from_is_read_as_it_read_it(tmp_path: Path) -> None:
    data, loop = sections(tmp_path, replay_fraction=0.95)
    data = data.model_copy(update={"system": "Be brief.", "limit": 20})
    made = compose(data, loop, tmp_path / "renewal", seed=1, older=[data])
    rows = [e for file in (made.train, made.search) for e in load_examples(file, "auto")]
    assert all(row.messages[0].role == "system" for row in rows)
    assert len(rows) == 40 + 20, "each old row once, and none beyond the limit"


def test_unpaired_rows_come_back_with_answer_and_label(tmp_path: Path) -> None:
    def unpaired(name: str, numbers: range) -> str:
        rows = [
            {"prompt": f"{name} {i}", "completion": "yes", "label": i % 2 == 0} for i in numbers
        ]
        path = tmp_path / f"{name}-{numbers.start}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    data = DataSection(
        train=unpaired("old", range(20)), eval=unpaired("old", range(20, 24)), format="unpaired"
    )
    loop = LoopSection(
        feedback=unpaired("new", range(16)), feedback_eval=unpaired("new", range(16, 20))
    )
    made = compose(data, loop, tmp_path / "renewal", seed=0)
    rows = load_examples(made.train, "auto")
    assert {row.answer for row in rows} == {"yes"}
    assert {row.is_wanted for row in rows} == {True, False}


def test_preference_rows_come_back_as_they_went(tmp_path: Path) -> None:
    rows = [
        {"prompt": [{"role": "user", "content": f"q{i}"}], "chosen": "good", "rejected": "bad"}
        for i in range(24)
    ]
    for name, part in (("train", rows[:8]), ("eval", rows[8:10]), ("feval", rows[10:12])):
        text = "".join(json.dumps(r) + "\n" for r in part)
        (tmp_path / f"{name}.jsonl").write_text(text)
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[12:]))
    data = DataSection(train=str(tmp_path / "train.jsonl"), eval=str(tmp_path / "eval.jsonl"))
    loop = LoopSection(
        feedback=str(tmp_path / "new.jsonl"), feedback_eval=str(tmp_path / "feval.jsonl")
    )
    made = compose(data, loop, tmp_path / "renewal", seed=0)
    known = {
        example.model_dump_json(exclude={"source"})
        for example in load_examples(str(tmp_path / "new.jsonl"), "preference")
    }
    found = {e.model_dump_json(exclude={"source"}) for e in load_examples(made.train, "auto")}
    assert len(found & known) == made.num_new


@pytest.mark.parametrize(("judge", "place"), [("feval", "feval.jsonl:1"), ("eval", "eval.jsonl:1")])
def test_feedback_that_the_gate_judges_by_is_refused(
    tmp_path: Path, judge: str, place: str
) -> None:
    data, loop = sections(tmp_path)
    leaked = "new 200" if judge == "feval" else "old 200"
    write(tmp_path / "feedback.jsonl", [f"new {i}" for i in range(20)] + [leaked])
    with pytest.raises(DataError, match=f"feedback.jsonl:21 = {place}"):
        compose(data, loop, tmp_path / "renewal", seed=1)
    assert not (tmp_path / "renewal").exists()


def test_missing_settings_and_too_little_feedback_are_refused_in_words(tmp_path: Path) -> None:
    data, loop = sections(tmp_path)
    with pytest.raises(ConfigError, match=r"needs loop\.feedback"):
        compose(data, LoopSection(), tmp_path / "renewal", seed=1)
    with pytest.raises(ConfigError, match=r"needs data\.eval"):
        compose(data.model_copy(update={"eval": None}), loop, tmp_path / "renewal", seed=1)
    write(tmp_path / "feedback.jsonl", ["new 1"] * 30)
    with pytest.raises(DataError, match="1 different labelled rows are too few"):
        compose(data, loop, tmp_path / "renewal", seed=1)
