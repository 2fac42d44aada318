"""From a study's files to its page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from graft.core.errors import AdapterError, ConfigError
from graft.core.events import EventLog
from graft.pipelines.report import read_report, report
from graft.recipe import load_recipe, to_yaml
from graft.runtime.study import open_study
from graft.runtime.trials import StudyFacts

FACTS = StudyFacts(space="s", model="m", data="d", objectives=("eval/loss min",), eval_rows=8)


@pytest.fixture
def home(tmp_path: Path, model_folder: Path, data_folder: Path) -> Path:
    """A home with one study of seven trials on the tiny model, one of them failed."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""
name: tiny
model: {{source: {model_folder}, dtype: fp32}}
data: {{train: {data_folder}/train.jsonl, eval: {data_folder}/eval.jsonl, format: messages}}
method: {{type: lora, r: {{choice: [2, 4, 8]}}}}
train: {{steps: 20, lr: {{log: [1.0e-4, 1.0e-2]}}}}
search: {{trials: 7, sampler: random}}
""",
        encoding="utf-8",
    )
    space = load_recipe(recipe)
    folder = tmp_path / "home" / "studies" / "tiny"
    with open_study(folder, space.sections().search, FACTS) as study:
        (folder / "recipe.yaml").write_text(to_yaml(space.content()), encoding="utf-8")
        for number in range(7):
            asked = study.ask(space)
            assert asked is not None
            log = EventLog(study.trial_folder(number) / "report.jsonl")
            for step in (10, 20):
                loss = asked.recipe.train.lr * 100 / step
                log.append(
                    "report", steps=step, seconds=1.0, **{"train/loss": 2 * loss, "eval/loss": loss}
                )
                study.report(number, step, {"eval/loss": loss, "train/loss": 2 * loss})
            study.tell(
                number,
                "failed" if number == 3 else "complete",
                reason="lost" if number == 3 else None,
            )
    return tmp_path / "home"


def test_a_study_becomes_a_page_and_the_same_figures(home: Path) -> None:
    result = report("tiny", home=home)
    page = Path(result.path).read_text(encoding="utf-8")
    facts = read_report(Path(result.figures))
    assert result.num_trials == 7
    assert "eval/loss" in page
    assert [t.state for t in facts.trials].count("failed") == 1
    assert [p.steps for p in facts.trials[0].searched] == [10, 20]
    assert facts.importances[0].param == "train/lr"
    assert [split.name for split in facts.data] == ["train", "held out"]
    assert facts.data[0].num_rows == 96


def test_a_report_goes_on_without_data_that_has_moved(home: Path) -> None:
    recipe = home / "studies" / "tiny" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("train.jsonl", "gone.jsonl"), encoding="utf-8")
    assert read_report(Path(report("tiny", home=home).figures)).data == ()


def test_the_loop_of_the_same_name_is_in_it(home: Path) -> None:
    log = EventLog(home / "loops" / "tiny" / "events.jsonl")
    log.append("start", incarnation=1)
    verdict = {
        "statistic": 2.0,
        "threshold": 1.0,
        "p_value": 0.001,
        "is_drift": True,
        "num_rows": 50,
        "detector": "mmd",
        "index": 0,
        "num_prompts": 100,
        "is_alarm": True,
        "held_back": None,
    }
    log.append("verdict", **verdict)
    log.append("state", state="PROMOTED", evidence={"successor": "a" * 64})
    points = json.loads(Path(report("tiny", home=home).figures).read_text())["drift"]
    assert [p["state"] for p in points] == ["STABLE", "DRIFT", "PROMOTED"]


@pytest.mark.parametrize(("name", "error"), [("other", ConfigError), ("../tiny", AdapterError)])
def test_an_unknown_study_is_refused_in_words(
    home: Path, name: str, error: type[Exception]
) -> None:
    with pytest.raises(error, match=r"tiny|adapter name"):
        report(name, home=home)


def test_a_training_that_is_no_study_is_told_where_its_figures_are(home: Path) -> None:
    told = home / "runs" / "alone" / "report.jsonl"
    told.parent.mkdir(parents=True)
    told.write_text("")
    with pytest.raises(ConfigError, match=r"no study 'alone' .* 'alone' is in .*report\.jsonl"):
        report("alone", home=home)
