"""The alignment pairs are what their generator says: right, wrong in one way, and held out."""

from __future__ import annotations

import json
import random
import runpy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from graft.data import load_examples

EXAMPLES = Path(__file__).parents[3] / "examples"
FOLDER = EXAMPLES / "alignment"
FIELDS = {"device", "place", "action", "value"}


@pytest.fixture(scope="module")
def generate() -> dict[str, Any]:
    """The generator's names."""
    return runpy.run_path(str(FOLDER / "generate.py"))


def read(name: str) -> list[dict[str, Any]]:
    """Committed rows."""
    lines = (FOLDER / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def pairs(name: str) -> list[tuple[str, dict[str, Any], dict[str, Any], str]]:
    """Sentence, right action, wrong action and kind of each committed pair."""
    return [
        (
            row["prompt"][1]["content"],
            json.loads(row["chosen"]),
            json.loads(row["rejected"]),
            row["kind"],
        )
        for row in read(name)
    ]


def test_the_committed_data_is_the_generators(generate: dict[str, Any]) -> None:
    for name, lines in generate["Generator"](0).parts().items():
        committed = (FOLDER / "data" / name).read_text(encoding="utf-8")
        assert committed == "\n".join(lines) + "\n"


def test_another_seed_makes_other_data(generate: dict[str, Any]) -> None:
    made = generate["Generator"](1).parts()
    rows = [json.loads(line) for line in made["eval.jsonl"]]
    assert {r["prompt"][1]["content"] for r in rows} != {p[0] for p in pairs("eval")}


@pytest.mark.parametrize("name", ["train", "eval"])
def test_each_kind_is_a_fifth_and_wrong_in_its_own_way(name: str) -> None:
    rows = pairs(name)
    counts = Counter(kind for *_, kind in rows)
    assert len(counts) == 5
    assert set(counts.values()) == {len(rows) // 5}
    for _, right, wrong, kind in rows:
        differing = {key for key in FIELDS if right.get(key) != wrong.get(key)}
        if kind == "missing_field":
            assert set(wrong) < set(right)
            assert len(differing) == 1
        elif kind in ("wrong_place", "wrong_value"):
            assert differing == {kind.removeprefix("wrong_")}
        elif kind == "wrong_action":
            assert {"action"} <= differing <= {"action", "value"}
        else:
            assert kind == "wrong_device"
            assert "device" in differing
            assert "place" not in differing


def test_the_parts_are_large_enough_and_share_no_sentence() -> None:
    sentences = [pair[0] for name in ("train", "eval") for pair in pairs(name)]
    sentences += [row["messages"][1]["content"] for row in read("sft")]
    smart_home = (EXAMPLES / "smart_home" / "data" / "eval.jsonl").read_text(encoding="utf-8")
    sentences += [json.loads(r)["messages"][1]["content"] for r in smart_home.splitlines()]
    assert len(sentences) == len(set(sentences))
    assert len(pairs("train")) >= 800
    assert len(pairs("eval")) >= 300


def test_no_held_out_command_is_in_training_or_held_out_of_smart_home(
    generate: dict[str, Any],
) -> None:
    trained, held_out = (
        {command.text: command.action for pool in part for command in pool}
        for part in generate["Generator"](0).split()
    )
    home = runpy.run_path(str(EXAMPLES / "smart_home" / "generate.py"))
    draw = random.Random(0)
    parts = [home["split_cores"](intents, draw) for intents in home["FAMILIES"].values()]
    held_out_there = {text for _, pools in parts for pool in pools for text, _ in pool}
    assert not set(trained) & set(held_out)
    assert not (set(trained) | set(held_out)) & held_out_there
    for name, known in (("train", trained), ("eval", held_out)):
        for sentence, right, wrong, kind in pairs(name):
            said = [action for text, action in known.items() if text.lower() in sentence.lower()]
            assert right in said
            assert wrong in said or kind == "missing_field"


def test_every_file_loads_as_its_format() -> None:
    for name, format in (("sft", "messages"), ("train", "preference"), ("eval", "preference")):
        examples = load_examples(str(FOLDER / "data" / f"{name}.jsonl"), format)
        assert len(examples) == len(read(name))
