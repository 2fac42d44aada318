"""`graft check`: the proof on screen, as JSON, and its refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from graft.cli.main import build_app
from graft.core.errors import DataError
from graft.pipelines.check import check
from graft.pipelines.train import train
from graft.pipelines.tune import tune
from graft.recipe.load import load_recipe


@pytest.fixture
def recipe_file(tmp_path: Path, model_folder: Path, data_folder: Path) -> Path:
    """A recipe with a hole, on the tiny model."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {{source: '{model_folder}', dtype: fp32}}\n"
        f"data: {{train: '{data_folder}/train.jsonl', eval: '{data_folder}/eval.jsonl'}}\n"
        "method: {type: lora, r: {choice: [2, 4]}}\n",
        encoding="utf-8",
    )
    return path


def test_a_rendered_row_shows_what_is_learned(recipe_file: Path, tmp_path: Path) -> None:
    report = check(load_recipe(recipe_file), home=tmp_path / "home", num_samples=1)
    (row,) = report.samples
    asked, learned = row.segments
    assert not asked.is_supervised
    assert asked.text.endswith("<|im_start|>assistant\n")
    assert learned.is_supervised
    assert learned.text.endswith("<|im_end|>")
    assert report.data.train.num_rows == 96
    assert report.feedback is None


def test_a_rendered_pair_shows_its_two_answers_apart(recipe_file: Path, tmp_path: Path) -> None:
    pair = {"prompt": "lamp?", "chosen": "lamp=7", "rejected": "door=7"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair) + "\n", encoding="utf-8")
    data = f"data={{train: '{tmp_path}/pairs.jsonl'}}"
    space = load_recipe(recipe_file, [data, "objective=dpo", "method.r=4"])
    report = check(space, home=tmp_path / "home")
    (row,) = report.samples
    found = [(segment.branch, segment.text) for segment in row.segments[1:]]
    assert found == [(1, "lamp=7<|im_end|>"), (2, "door=7<|im_end|>")]


def test_the_verb_tells_the_answers_of_a_row_apart_and_what_is_not_learned(
    recipe_file: Path, tmp_path: Path
) -> None:
    pair = {"prompt": "lamp?", "chosen": "lamp=7", "rejected": "door=7"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair) + "\n", encoding="utf-8")

    def said(objective: str) -> str:
        given = [f"data={{train: {tmp_path}/pairs.jsonl}}", f"objective={objective}", "method.r=4"]
        options = [part for value in given for part in ("--set", value)]
        home = ["--home", str(tmp_path / "home")]
        result = CliRunner().invoke(build_app(), ["check", str(recipe_file), *home, *options])
        assert result.exit_code == 0, result.output
        return result.stdout

    assert "\nanswer 1: ⟦lamp=7<|im_end|>⟧\nanswer 2: ⟦door=7<|im_end|>⟧" in said("dpo")
    wanted, unwanted = said("kto").split("pairs.jsonl:1: ")[1:]
    assert "tokens are learned, wanted" in wanted
    assert "tokens are learned, unwanted" in unwanted
    sampled = said("{type: grpo, rewards: [{metric: exact_match}]}")
    assert "pairs.jsonl:1: sampled answers are learned" in sampled
    assert "⟦" not in sampled


def test_rows_are_proved_for_every_objective_that_may_be_chosen(
    recipe_file: Path, tmp_path: Path
) -> None:
    given = ["objective={choice: [sft, {type: dpo, beta: {log: [0.1, 1]}}]}"]
    words = r"train\.jsonl:1: objective 'dpo' learns from pairs"
    with pytest.raises(DataError, match=words):
        check(load_recipe(recipe_file, given), home=tmp_path / "home")
    with pytest.raises(DataError, match=words):
        tune(load_recipe(recipe_file, given), home=tmp_path / "home")


def test_prompts_without_answers_are_enough_where_answers_are_sampled(
    recipe_file: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": f"lamp {number}?"} for number in range(3)]
    (tmp_path / "asks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [f"data={{train: '{tmp_path}/asks.jsonl'}}", "method.r=4"]
    rewards = "rewards: [{metric: json_valid}]"
    report = check(
        load_recipe(recipe_file, [*given, f"objective={{type: grpo, {rewards}}}"]),
        home=tmp_path / "home",
    )
    assert report.data.train.num_rows == 3
    assert report.data.train.num_supervised_tokens == 0
    assert [len(row.segments) for row in report.samples] == [1, 1]
    with pytest.raises(DataError, match=r"asks\.jsonl:1: objective 'sft' learns from conv"):
        check(load_recipe(recipe_file, given), home=tmp_path / "home")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["eval.metrics=[loss]"], "no held-out row has a wanted answer, and eval.metrics loss"),
        (["eval.metrics=[exact_match]"], r"asks\.jsonl:1: metric 'exact_match' cannot score it"),
        (
            ["eval.metrics=[json_valid]", "objective.rewards=[{metric: {type: length}}]"],
            r"asks\.jsonl:1: reward 'length' cannot score it: .* give `max_chars`",
        ),
    ],
)
def test_what_cannot_be_scored_is_refused_before_anything_trains(
    given: list[str], words: str, recipe_file: Path, tmp_path: Path
) -> None:
    for name in ("asks", "more"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": f"{name}?"}) + "\n")
    rows = f"data={{train: {tmp_path}/more.jsonl, eval: {tmp_path}/asks.jsonl, format: prompts}}"
    if "objective" in given[-1]:
        rows = rows.replace("more", "swap").replace("asks", "more").replace("swap", "asks")
    objective = "objective={type: grpo, rewards: [{metric: json_valid}]}"
    space = load_recipe(recipe_file, [rows, objective, *given])
    with pytest.raises(DataError, match=words):
        check(space, home=tmp_path / "home")
    with pytest.raises(DataError, match=words):
        train(load_recipe(recipe_file, [rows, objective, *given, "method.r=2"]), home=tmp_path)


def test_a_preference_is_measured_on_held_out_pairs_alone(
    recipe_file: Path, tmp_path: Path
) -> None:
    words = r"eval\.jsonl:1: no held-out row is a pair of answers, and {} preference_accuracy"
    listed = ["eval.metrics=[loss, preference_accuracy]"]
    with pytest.raises(DataError, match=words.format("eval.metrics")):
        check(load_recipe(recipe_file, listed), home=tmp_path / "home")
    with pytest.raises(DataError, match=words.format("eval.metrics")):
        train(load_recipe(recipe_file, [*listed, "method.r=2"]), home=tmp_path / "home")
    searched = ["search.objectives=[{metric: eval/preference_accuracy, mode: max}]"]
    with pytest.raises(DataError, match=words.format("search.objectives")):
        check(load_recipe(recipe_file, searched), home=tmp_path / "home")
    complete = load_recipe(recipe_file, [*searched, "method.r=2"])
    assert check(complete, home=tmp_path / "home").data.eval is not None


def test_answers_that_the_context_could_not_hold_are_refused_before_the_base_is_loaded(
    recipe_file: Path, tmp_path: Path
) -> None:
    objective = "objective={{type: grpo, max_new_tokens: {}, rewards: [{{metric: exact_match}}]}}"
    check(load_recipe(recipe_file, [objective.format(300)]), home=tmp_path / "home")
    words = r"train\.jsonl:1: the prompt has \d+ tokens, an answer may have 500"
    with pytest.raises(DataError, match=words):
        check(load_recipe(recipe_file, [objective.format(500)]), home=tmp_path / "home")
    with pytest.raises(DataError, match=words):
        tune(load_recipe(recipe_file, [objective.format(500)]), home=tmp_path / "home")


def test_feedback_rows_are_proved_too(recipe_file: Path, tmp_path: Path) -> None:
    broken = tmp_path / "new.jsonl"
    broken.write_text('{"messages": []}\n', encoding="utf-8")
    space = load_recipe(recipe_file, [f"loop.feedback={broken}"])
    with pytest.raises(DataError, match=r"new\.jsonl:1"):
        check(space, home=tmp_path / "home")


def test_the_verb_prints_the_proof_and_marks_what_is_learned(
    recipe_file: Path, tmp_path: Path
) -> None:
    arguments = ["check", str(recipe_file), "--home", str(tmp_path / "home"), "--samples", "1"]
    plain = CliRunner().invoke(build_app(), arguments)
    assert plain.exit_code == 0, plain.output
    assert "⟦" in plain.stdout
    assert "train" in plain.stdout
    as_json = CliRunner().invoke(build_app(), [*arguments, "--json"])
    assert json.loads(as_json.stdout)["data"]["eval"]["num_rows"] == 24


def test_leaked_rows_end_in_exit_code_2(recipe_file: Path, data_folder: Path) -> None:
    leak = f"data.eval={data_folder}/train.jsonl"
    home = str(recipe_file.parent / "home")
    result = CliRunner().invoke(
        build_app(), ["check", str(recipe_file), "--home", home, "--set", leak]
    )
    assert result.exit_code == 2
    assert "96 held-out rows are also training rows" in result.stderr
