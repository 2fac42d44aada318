"""`graft study` on studies with and without a process that runs them."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from graft.core.errors import ConfigError
from graft.core.progress import QUIET
from graft.pipelines import study as verbs
from graft.recipe.load import load_recipe, to_yaml
from graft.recipe.space import RecipeSpace
from graft.runtime.attended import Attendant
from graft.runtime.budget import Budget
from graft.runtime.requests import open_requests
from graft.runtime.searcher import StudySearcher, TrialQueue
from graft.runtime.study import open_study
from graft.runtime.trials import Earlier, StudyFacts

FACTS = StudyFacts(
    space="space", model="model", data="data", objectives=("eval/loss min",), eval_rows=64
)
CONTENT: dict[str, Any] = {
    "name": "tiny",
    "model": {"source": "x/y"},
    "data": {"train": "t.jsonl", "eval": "e.jsonl"},
    "method": {"type": "lora", "r": {"choice": [2, 4, 8, 12]}},
    "train": {"steps": 12, "report_every": 4},
    "search": {"trials": 3},
}


class NoTrials:
    """Tune's controller before the first trial."""

    def get_trials(self) -> list[Any]:
        return []


@pytest.fixture
def space(tmp_path: Path) -> RecipeSpace:
    folder = tmp_path / "studies" / "tiny"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(to_yaml(CONTENT))
    space = load_recipe(folder / "recipe.yaml")
    with open_study(folder, space.sections().search, FACTS) as study:
        for outcome in ("complete", None):
            asked = study.ask(space)
            assert asked is not None
            study.note(asked.number, executor="packed")
            study.report(asked.number, 12, {"eval/loss": 0.5, "train/loss": 0.75})
            if outcome == "complete":
                study.tell(asked.number, outcome)
    return space


def test_studies_are_listed_and_shown(space: RecipeSpace, tmp_path: Path) -> None:
    broken = tmp_path / "studies" / "broken"
    broken.mkdir()
    (broken / "recipe.yaml").write_text("a: 1\n")
    damaged, tiny = verbs.list_studies(home=tmp_path).studies
    assert damaged.problem is not None
    assert (tiny.num_ended, tiny.num_running, tiny.trials, tiny.driver) == (1, 1, 3, None)
    assert tiny.best is not None
    assert tiny.best.metrics["eval/loss"] == 0.5
    shown = verbs.show_study("tiny", home=tmp_path)
    assert [trial.state for trial in shown.trials] == ["complete", "running"]
    assert shown.best == 0
    assert shown.resume_command.startswith("graft tune ")
    with pytest.raises(ConfigError, match=r"no study 'other' in .*; known: broken, tiny"):
        verbs.show_study("other", home=tmp_path)


def test_trials_of_a_study_with_history_are_known_by_their_numbers(
    space: RecipeSpace, tmp_path: Path
) -> None:
    content = {**CONTENT, "name": "later"}
    folder = tmp_path / "studies" / "later"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(to_yaml(content))
    later = load_recipe(folder / "recipe.yaml")
    with open_study(folder, later.sections().search, FACTS) as study:
        study.take("tiny", later, (), [Earlier("tiny/0", {"method/r": 2}, {"eval/loss": 0.1})])
        asked = study.ask(later)
        assert asked is not None
        assert asked.number == 1
        study.note(asked.number, executor="packed")
        study.report(asked.number, 12, {"eval/loss": 0.4})
        study.tell(asked.number, "complete")
    (line,) = (s for s in verbs.list_studies(home=tmp_path).studies if s.name == "later")
    assert line.best is not None
    assert (line.best.number, line.best.metrics["eval/loss"]) == (1, 0.4)


def test_without_a_driver_it_is_done_at_once(space: RecipeSpace, tmp_path: Path) -> None:
    stopped = verbs.stop("tiny", 1, home=tmp_path)
    assert stopped.is_done
    assert stopped.resume_command is not None
    cloned = verbs.clone("tiny", 0, ["method.r=8"], home=tmp_path)
    assert cloned.trial == 2
    shown = verbs.show_study("tiny", home=tmp_path)
    assert [trial.state for trial in shown.trials] == ["complete", "stopped", "waiting"]
    assert shown.trials[2].params == {"method/r": 8}
    with pytest.raises(ConfigError, match="is not being run"):
        verbs.stop("tiny", home=tmp_path)
    with pytest.raises(ConfigError, match="expected PATH=VALUE"):
        verbs.clone("tiny", 0, ["method.r"], home=tmp_path)
    with pytest.raises(ConfigError, match=r"16 is not in choice \[2, 4, 8, 12\]"):
        verbs.clone("tiny", 0, ["method.r=16"], home=tmp_path)


def test_a_driver_does_it_and_the_words_come_back(space: RecipeSpace, tmp_path: Path) -> None:
    folder = tmp_path / "studies" / "tiny"
    is_up, ends = threading.Event(), threading.Event()

    def drive() -> None:
        with open_study(folder, space.sections().search, FACTS) as study:
            attendant = Attendant(study, space, Budget(study), QUIET)
            queue = TrialQueue(study, space, turn=4)
            is_up.set()
            while not ends.is_set():
                attendant.look(NoTrials(), queue, StudySearcher(queue, "packed"))
                time.sleep(0.02)

    driver = threading.Thread(target=drive)
    driver.start()
    try:
        assert is_up.wait(30)
        assert verbs.show_study("tiny", home=tmp_path).driver is not None
        change = verbs.stop("tiny", 1, home=tmp_path)
        assert change.is_done
        assert change.trial == 1
        assert change.resume_command is None
    finally:
        ends.set()
        driver.join()
    assert verbs.show_study("tiny", home=tmp_path).trials[1].state == "stopped"


def test_a_driver_that_does_not_answer_keeps_the_wish(
    space: RecipeSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verbs, "ANSWERS_WITHIN_S", 0.1)
    folder = tmp_path / "studies" / "tiny"
    with open_study(folder, space.sections().search, FACTS):
        change = verbs.stop("tiny", home=tmp_path)
    assert not change.is_done
    assert "has not answered yet" in change.words
    assert len(open_requests(folder)) == 1
