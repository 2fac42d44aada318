"""The `adapters` verbs, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from graft.artifacts import AdapterRecord, Store
from graft.cli.main import build_app
from tests.unit.artifacts.conftest import make_folder


@pytest.fixture
def home(tmp_path: Path) -> Path:
    store = Store(tmp_path / "home")
    for number in (1, 2):
        folder = make_folder(tmp_path / f"adapter-{number}", float(number))
        record = AdapterRecord(name="home", base_source="t", base_digest="b" * 64, method="lora")
        store.register("home", store.publish(folder, record))
    return tmp_path / "home"


def run(home: Path, *words: str) -> tuple[int, str]:
    result = CliRunner().invoke(build_app(), ["adapters", *words, "--home", str(home)])
    return result.exit_code, result.output


def test_promote_rollback_and_ls_tell_who_is_champion(home: Path) -> None:
    assert run(home, "promote", "home", "1", "--expected", "0")[0] == 0
    assert run(home, "promote", "home", "2")[0] == 0
    code, output = run(home, "ls", "--json")
    lines = json.loads(output)["names"][0]["versions"]
    assert [line["aliases"] for line in lines] == [["previous"], ["champion"]]
    assert run(home, "rollback", "home")[0] == 0
    code, output = run(home, "show", "home", "--json")
    assert "home@champion" in json.loads(output)["names"]
    assert json.loads(output)["names"][0] == "home/1"
    code, output = run(home, "rollback", "home")
    assert (code, "no previous champion" in output) == (2, True)


def test_a_lost_race_a_bad_name_and_an_unknown_version_are_exit_two(home: Path) -> None:
    assert run(home, "promote", "home", "1")[0] == 0
    for words in (
        ("promote", "home", "2", "--expected", "0"),
        ("promote", "../x", "1"),
        ("promote", "home", "7"),
        ("show", "nobody"),
    ):
        assert run(home, *words)[0] == 2


def test_damage_is_listed_and_exit_two_for_verify(home: Path) -> None:
    assert run(home, "verify")[0] == 0
    digest = Store(home).names.state("home").digest(2)
    path = home / "artifacts" / digest / "adapter_config.json"
    path.write_text(path.read_text() + " ")
    code, output = run(home, "verify")
    assert (code, "adapter_config.json" in output) == (2, True)
    code, output = run(home, "ls", "--json")
    assert (code, "has changed" in output) == (0, True)
