"""The verbs on a mixture of sources: what they show, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from graft.cli.main import build_app
from graft.core.errors import ConfigError
from graft.core.progress import QUIET
from graft.engine.run_folder import read_reports
from graft.pipelines.check import check
from graft.pipelines.evaluate import evaluate_reference
from graft.pipelines.train import train
from graft.pipelines.tune import prove
from graft.pipelines.watch import fit_reference, monitor_settings
from graft.recipe import load_recipe
from graft.testing import tiny_rows


@pytest.fixture
def recipe_file(tmp_path: Path, model_folder: Path, data_folder: Path) -> Path:
    """Conversations, plain text and preferences, each with its objective."""
    texts = [{"text": f"the lamp of room {n} is number {n * n}"} for n in range(60)]
    pairs = [
        {
            "prompt": row["messages"][:1],
            "chosen": row["messages"][1:],
            "rejected": [{"role": "assistant", "content": "horn=0"}],
        }
        for row in tiny_rows(200)[160:]
        if row["messages"][1]["content"] != "horn=0"
    ]
    parts = {
        "text": texts[:50],
        "text_eval": texts[50:],
        "pairs": pairs[:20],
        "pairs_eval": pairs[20:],
    }
    for name, rows in parts.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train_file, eval_file = data_folder / "train.jsonl", data_folder / "eval.jsonl"
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"""\
name: mixed
model: {{source: {model_folder}, dtype: fp32}}
data:
  sources:
    - {{name: commands, train: {train_file}, eval: {eval_file}, eval_limit: 8, weight: 2}}
    - {{name: rooms, train: text.jsonl, eval: text_eval.jsonl, max_length: 64,
       objective: {{type: pretrain}}}}
    - {{name: taste, train: pairs.jsonl, eval: pairs_eval.jsonl, objective: {{type: dpo}}}}
method: {{type: lora, r: 4}}
train: {{steps: 6, batch_size: 8, lr: 5.0e-3, report_every: 3}}
eval: {{metrics: [loss, exact_match, preference_accuracy], max_new_tokens: 4}}
"""
    )
    return path


def test_a_mixture_trains_and_each_source_is_measured(recipe_file: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    result = train(load_recipe(recipe_file), home=home)
    rows = {name: metric.rows for name, metric in result.metrics.items()}
    num_pairs = rows["eval/taste/preference_accuracy"]
    assert rows == {
        "eval/loss": 18 + num_pairs,
        "eval/commands/loss": 8,
        "eval/rooms/loss": 10,
        "eval/taste/loss": num_pairs,
        "eval/exact_match": 8 + num_pairs,
        "eval/commands/exact_match": 8,
        "eval/taste/exact_match": num_pairs,
        "eval/preference_accuracy": num_pairs,
        "eval/taste/preference_accuracy": num_pairs,
    }
    last = read_reports(Path(result.folder))[-1]
    told = {name.removeprefix("objective/") for name in last if name.startswith("objective/")}
    assert {"commands/loss", "rooms/loss", "taste/loss", "taste/reward_accuracy"} <= told
    measured = evaluate_reference(str(result.artifact), home=home)
    assert measured.metrics["eval/rooms/loss"] == result.metrics["eval/rooms/loss"]
    assert "rooms: " in measured.data


def test_other_weights_are_another_run(recipe_file: Path, tmp_path: Path) -> None:
    train(load_recipe(recipe_file), home=tmp_path / "home")
    with pytest.raises(ConfigError, match=r"a run with data\.sources = .*'weight': 2"):
        train(load_recipe(recipe_file, ["data.sources.0.weight=3"]), home=tmp_path / "home")


def test_a_search_for_one_sources_metric_measures_it_at_each_report(
    recipe_file: Path, tmp_path: Path
) -> None:
    from graft.engine.run import load_run, train_run

    search = "search.objectives=[{metric: eval/taste/preference_accuracy, mode: max}]"
    run = load_run(load_recipe(recipe_file, [search]).recipe(), tmp_path)
    train_run(run, tmp_path / "run", home=tmp_path, eval_rows=6)
    for report in read_reports(tmp_path / "run"):
        assert 0 <= report["eval/taste/preference_accuracy"] <= 1
        assert report["eval/rooms/loss"] > 0


def test_what_a_study_stands_on_has_the_mixture_in_it(recipe_file: Path, tmp_path: Path) -> None:
    def facts(*overrides: str) -> str:
        space = load_recipe(recipe_file, ["train.lr={log: [1.0e-4, 1.0e-2]}", *overrides])
        return prove(space, home=tmp_path / "home").facts.space

    assert facts() == facts()
    assert facts("data.sources.0.weight=3") != facts()
    assert facts("data.sources.2.objective.beta=0.3") != facts()


def test_a_study_stands_on_the_choices_of_scale_and_not_on_its_fixed_settings(
    recipe_file: Path, tmp_path: Path
) -> None:
    def facts(*overrides: str) -> str:
        return prove(load_recipe(recipe_file, overrides), home=tmp_path / "home").facts.space

    few, more = (f"scale.zero_stage={{choice: {stages}}}" for stages in ([0, 1], [0, 1, 2]))
    assert facts(few) != facts(more)
    assert facts(few) == facts(few, "scale.threads=1")


def test_the_check_shows_the_counts_of_each_source(recipe_file: Path, tmp_path: Path) -> None:
    report = check(load_recipe(recipe_file), home=tmp_path / "home")
    assert list(report.data.parts) == ["commands", "rooms", "taste"]
    assert report.data.parts["rooms"].train.num_examples == 50
    assert report.data.parts["rooms"].train.num_rows < 50
    command = ["check", str(recipe_file), "--home", str(tmp_path / "home")]
    shown = CliRunner().invoke(build_app(), command, env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    assert all(name in shown.stdout for name in ("rooms train", "taste held out"))


def test_drift_is_watched_against_the_prompts_of_all_sources(
    recipe_file: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    found = fit_reference(load_recipe(recipe_file), home=home, name="mixed")
    assert found.num_rows == 96 + 20
    assert "pairs.jsonl" in found.source


def test_a_renewal_of_a_mixture_is_refused_in_words(recipe_file: Path, tmp_path: Path) -> None:
    home, words = tmp_path / "home", "needs one data source, and data.sources names commands, rooms"
    with pytest.raises(ConfigError, match="a renewal " + words):
        monitor_settings(
            load_recipe(recipe_file), home=home, name=None, renews=True, progress=QUIET
        )
    with pytest.raises(ConfigError, match="loop.feedback " + words):
        check(load_recipe(recipe_file, ["loop.feedback=new.jsonl"]), home=home)
