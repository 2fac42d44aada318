"""Costs of a trial: bytes are those of the published file, answers are timed at one length."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from graft.artifacts import Store
from graft.core.errors import DataError, TrainingError
from graft.engine.costs import answer_latency_ms, costs_of, predict_costs
from graft.engine.measurable import require_measurable
from graft.engine.memory.cap import Limits, MemoryCap
from graft.engine.memory.shape import ModelShape
from graft.engine.run import LoadedRun, load_run, run_facts, train_run
from graft.engine.run_folder import read_progress, read_reports
from graft.pipelines.finish import publish_trained
from graft.recipe.costs import LATENCY_PROMPTS, LATENCY_TOKENS
from graft.recipe.sections import Recipe

COSTS = ("cost/adapter_bytes", "cost/peak_memory_bytes", "cost/latency_ms")


def recipe_of(model_folder: Path, data_folder: Path, **sections: Any) -> Recipe:
    searched = [{"metric": metric, "mode": "min"} for metric in ("eval/loss", *COSTS)]
    content: dict[str, Any] = {
        "model": {"source": str(model_folder), "dtype": "fp32", "device": "cpu"},
        "data": {
            "train": str(data_folder / "train.jsonl"),
            "eval": str(data_folder / "eval.jsonl"),
            "max_length": 64,
        },
        "method": {"type": "lora", "r": 4},
        "train": {"steps": 4, "batch_size": 2, "report_every": 2},
        "search": {"objectives": searched, "eval_rows": 4},
        "eval": {"metrics": ["loss"]},
    }
    return Recipe.model_validate(content | sections)


@pytest.fixture(scope="module")
def loaded(
    model_folder: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> LoadedRun:
    return load_run(recipe_of(model_folder, data_folder), tmp_path_factory.mktemp("home"))


@pytest.mark.parametrize(
    "method",
    [
        {"type": "lora", "r": 4},
        {"type": "adalora"},
        {"type": "prefix", "num_virtual_tokens": 3},
        {"type": "bottleneck"},
        {"type": "full"},
    ],
    ids=lambda method: method["type"],
)
def test_adapter_bytes_are_those_of_the_published_file(
    model_folder: Path, data_folder: Path, tmp_path: Path, method: dict[str, Any]
) -> None:
    recipe = recipe_of(
        model_folder,
        data_folder,
        method=method,
        model={"source": str(model_folder), "dtype": "bf16", "device": "cpu"},
        search={
            "objectives": [
                {"metric": "eval/loss", "mode": "min"},
                {"metric": "cost/adapter_bytes", "mode": "min"},
            ]
        },
    )
    run = load_run(recipe, tmp_path)
    assert train_run(run, tmp_path / "run", home=tmp_path, eval_rows=2)
    kept = read_progress(tmp_path / "run", run_facts(run))
    assert kept is not None
    run = load_run(recipe, tmp_path)
    published = publish_trained(run, kept.state.tensors, store=Store(tmp_path))
    (file,) = published.path.glob("*.safetensors")
    told = [report["cost/adapter_bytes"] for report in read_reports(tmp_path / "run")]
    assert len(told) == 2
    assert told[-1] == file.stat().st_size == published.record.serving.num_bytes


def test_a_run_reports_what_was_predicted_and_times_its_end_alone(
    loaded: LoadedRun, model_folder: Path, tmp_path: Path
) -> None:
    cap = MemoryCap(ModelShape.of(model_folder), Limits("cpu", 2**50, threads=2))
    predict_costs(tmp_path, loaded.recipe, cap)
    assert train_run(loaded, tmp_path, home=tmp_path, eval_rows=2)
    loaded.model.remove_slot("adapter")
    first, last = read_reports(tmp_path)
    predicted = cap.predict(loaded.recipe).device_bytes
    assert first["cost/peak_memory_bytes"] == last["cost/peak_memory_bytes"] == predicted
    assert "cost/latency_ms" not in first
    assert last["cost/latency_ms"] > 0


def test_what_other_trials_taught_changes_no_prediction(
    loaded: LoadedRun, model_folder: Path, tmp_path: Path
) -> None:
    for name, factor in (("before", 1.0), ("after", 1.5)):
        limits = Limits("cpu", 2**50, threads=2, factor=factor)
        (tmp_path / name).mkdir()
        predict_costs(
            tmp_path / name, loaded.recipe, MemoryCap(ModelShape.of(model_folder), limits)
        )
    before, after = ((tmp_path / name / "costs.json").read_text() for name in ("before", "after"))
    assert before == after


def test_a_search_that_asks_for_no_cost_pays_for_none(loaded: LoadedRun, tmp_path: Path) -> None:
    plain = loaded.recipe.model_copy(update={"search": type(loaded.recipe.search)(eval_rows=4)})
    run = replace(loaded, recipe=plain)
    assert costs_of(run, "absent", {}, {"steps": 4.0}, tmp_path) == {}


def test_every_timed_answer_is_of_the_stated_length_whatever_it_would_say(
    loaded: LoadedRun,
) -> None:
    forwards = []
    layer = loaded.model.base.get_decoder().layers[0]
    hook = layer.register_forward_hook(lambda *_: forwards.append(1))
    loaded.model.add_slot("timed", loaded.recipe.method, seed=0)
    try:
        assert answer_latency_ms(loaded, "timed") > 0
    finally:
        loaded.model.remove_slot("timed")
        hook.remove()
    # The prompt gives the first token, each token after it the next; one answer warms up.
    assert len(forwards) == (1 + LATENCY_PROMPTS) * LATENCY_TOKENS


def test_broken_weights_are_not_timed(loaded: LoadedRun) -> None:
    loaded.model.add_slot("broken", loaded.recipe.method, seed=0)
    try:
        with torch.no_grad():
            for tensor in loaded.model.parameters("broken").values():
                tensor.fill_(float("nan"))
        with pytest.raises(TrainingError, match="cost/latency_ms cannot be timed"):
            answer_latency_ms(loaded, "broken")
    finally:
        loaded.model.remove_slot("broken")


def test_latency_without_prompts_is_refused_before_training(loaded: LoadedRun) -> None:
    without = loaded.prepared._replace(prompts=[])
    with pytest.raises(DataError, match="cost/latency_ms times answers to held-out prompts"):
        require_measurable(loaded.recipe, without, context_tokens=512)
