"""Searches for several things at once, and those that end early with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from graft.artifacts import Store
from graft.core.errors import ConfigError
from graft.core.events import read_events
from graft.core.pareto import dominates
from graft.core.progress import Progress
from graft.pipelines.report import read_report, report
from graft.pipelines.tune import TuneResult, tune
from graft.recipe.load import load_recipe
from graft.runtime.study import read_study
from tests.ray.test_search import write_recipe

pytestmark = [
    pytest.mark.ray,
    # Ray's own modules set options that Ray has deprecated.
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\."),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

SEARCHED = ("eval/loss", "cost/adapter_bytes", "cost/peak_memory_bytes", "cost/latency_ms")


class Said(Progress):
    """Keeps what people were told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def searching(metrics: tuple[str, ...] = SEARCHED[:1], **fields: Any) -> dict[str, Any]:
    objectives = [{"metric": metric, "mode": "min"} for metric in metrics]
    return {"objectives": objectives, "pack_slots": 3, "eval_rows": 8, **fields}


@pytest.fixture(scope="module")
def searched(
    model_folder: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, TuneResult]:
    folder = tmp_path_factory.mktemp("costs")
    method = {"choice": [{"type": "lora", "r": {"choice": [2, 32]}}, {"type": "full"}]}
    recipe = write_recipe(
        folder,
        model_folder,
        data_folder,
        method=method,
        search=searching(SEARCHED, trials=6, sampler="nsga2", points=[{"method": "full"}]),
    )
    return folder / "home", tune(load_recipe(recipe), home=folder / "home")


def test_every_trial_has_the_costs_wherever_it_ran(searched: tuple[Path, TuneResult]) -> None:
    home, result = searched
    assert {trial.executor for trial in result.trials} == {"packed", "dedicated"}
    sizes: dict[str, set[float]] = {}
    for trial in result.trials:
        assert trial.metrics["cost/peak_memory_bytes"] > 1e6
        assert ("cost/latency_ms" in trial.metrics) == (trial.state == "complete")
        kind = f"{trial.params['method']} {trial.params.get('method[lora]/r', '')}"
        sizes.setdefault(kind, set()).add(trial.metrics["cost/adapter_bytes"])
    assert all(len(of_kind) == 1 for of_kind in sizes.values())
    assert len(sizes) > 1
    published = Store(home).open(result.artifact)
    assert published.record.serving.num_bytes == result.best.metrics["cost/adapter_bytes"]


def test_the_front_is_of_all_that_is_searched(searched: tuple[Path, TuneResult]) -> None:
    _, result = searched
    whole = {
        trial.number: [trial.metrics[metric] for metric in SEARCHED]
        for trial in result.trials
        if trial.state == "complete"
    }
    expected = [
        number
        for number, own in whole.items()
        if not any(dominates(other, own) for other in whole.values())
    ]
    assert sorted(result.front) == expected
    assert result.best.number in expected


def test_study_and_report_have_the_costs_with_their_units(
    searched: tuple[Path, TuneResult],
) -> None:
    home, result = searched
    space = load_recipe(Path(result.folder) / "recipe.yaml")
    study = read_study(Path(result.folder), space.sections().search)
    best = study.trial(result.best.number)
    assert {metric: best.metrics[metric] for metric in SEARCHED} == {
        metric: result.best.metrics[metric] for metric in SEARCHED
    }
    written = report("tiny", home=home)
    facts = read_report(Path(written.figures))
    assert [o.unit for o in facts.objectives] == ["", "bytes", "bytes", "ms"]
    assert set(facts.front) == set(result.front)
    page = Path(written.path).read_text()
    for words in (
        "cost/adapter_bytes, kB (lower",
        "cost/latency_ms, ms (lower",
        " MB</td>",
        " ms</td>",
    ):
        assert words in page


def test_the_events_say_which_sampler_was_taken(searched: tuple[Path, TuneResult]) -> None:
    _, result = searched
    events = read_events(Path(result.folder) / "events.jsonl")
    (said,) = [event for event in events if event["event"] == "sampler"]
    assert said["name"] == "nsga2"
    assert "method[lora]/r at random" in said["reason"]


def test_a_space_of_one_point_that_can_be_ends_after_it_in_words(
    model_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(
        tmp_path,
        model_folder,
        data_folder,
        method={"choice": [{"type": "lora", "r": 4}, {"type": "full"}]},
        train={"steps": 4, "batch_size": 2, "report_every": 2},
        search=searching(trials=5, executor="packed"),
    )
    said = Said()
    result = tune(load_recipe(recipe), home=tmp_path / "home", progress=said)
    assert [trial.state for trial in result.trials] == ["complete"]
    words = "every point of the space has been tried: the search ends with 1 of 5 trials"
    assert words in said.notes
    assert result.num_infeasible > 0
    assert any("2 points for 5 trials: each is tried once" in note for note in said.notes)
    events = [event["event"] for event in read_events(Path(result.folder) / "events.jsonl")]
    assert "exhausted" in events


def test_a_metric_that_no_trial_reports_ends_the_search_after_the_first(
    model_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(
        tmp_path,
        model_folder,
        data_folder,
        train={"steps": 4, "batch_size": 2, "report_every": 2, "lr": {"log": [1e-4, 1e-2]}},
        search=searching(("objective/reward",), trials=6, pack_slots=1),
    )
    space = load_recipe(recipe)
    with pytest.raises(ConfigError) as caught:
        tune(space, home=tmp_path / "home")
    assert "objective/reward, which no trial reports: trial 0 has ended" in str(caught.value)
    assert "eval/loss" in str(caught.value)
    study = read_study(tmp_path / "home" / "studies" / "tiny", space.sections().search)
    assert [trial.state for trial in study.trials] == ["failed"]
