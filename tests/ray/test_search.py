"""A search on the tiny model: packed trials under ASHA, one study, one published adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from graft.artifacts import Store
from graft.core.errors import ConfigError
from graft.core.events import read_events
from graft.pipelines.tune import TuneResult, tune
from graft.recipe.load import load_recipe, to_yaml

pytestmark = [
    pytest.mark.ray,
    # Ray's own modules set options that Ray has deprecated.
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\."),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


def write_recipe(folder: Path, model_folder: Path, data_folder: Path, **sections: Any) -> Path:
    content: dict[str, Any] = {
        "name": "tiny",
        "model": {"source": str(model_folder), "dtype": "fp32", "device": "cpu"},
        "data": {
            "train": str(data_folder / "train.jsonl"),
            "eval": str(data_folder / "eval.jsonl"),
            "max_length": 64,
        },
        "method": {"type": "lora", "r": {"choice": [2, 4, 8]}},
        "train": {
            "steps": 16,
            "batch_size": 4,
            "lr": {"log": [1e-4, 1e-2]},
            "report_every": 4,
        },
        "search": {"trials": 6, "pack_slots": 3, "eval_rows": 8},
        "eval": {"metrics": ["loss"]},
        **sections,
    }
    path = folder / "recipe.yaml"
    path.write_text(to_yaml(content))
    return path


@pytest.fixture(scope="module")
def searched(
    model_folder: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, TuneResult]:
    folder = tmp_path_factory.mktemp("search")
    recipe = write_recipe(folder, model_folder, data_folder, track={"wandb": "offline"})
    home = folder / "home"
    return recipe, home, tune(load_recipe(recipe), home=home)


def wandb_records(path: Path) -> list[Any]:
    """What a run of W&B was told, in order: its file is a log in LevelDB's format."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, block, header = path.read_bytes(), 7, 32 * 1024, 7
    records, parts = [], b""
    while at + header <= len(content):
        if block - at % block < header:
            at += block - at % block
            continue
        length = int.from_bytes(content[at + 4 : at + 6], "little")
        kind = content[at + 6]
        parts += content[at + header : at + header + length]
        at += header + length
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(parts))
            parts = b""
    return records


def test_a_packed_search_tells_every_trial_as_it_was(
    searched: tuple[Path, Path, TuneResult],
) -> None:
    _, _, result = searched
    assert len(result.trials) == result.num_run == 6
    assert {t.executor for t in result.trials} == {"packed"}
    for trial in result.trials:
        assert trial.state == ("complete" if trial.steps == 16 else "stopped")
        assert trial.metrics["eval/loss"] > 0
    assert any(t.state == "stopped" for t in result.trials)
    best = min(t.metrics["eval/loss"] for t in result.trials if t.state == "complete")
    assert result.best.metrics["eval/loss"] == best


def test_every_trial_is_tracked_offline_when_asked(
    searched: tuple[Path, Path, TuneResult],
) -> None:
    _, home, result = searched
    runs = (home / "studies" / result.study / "wandb").rglob("run-*.wandb")
    numbers = {int(path.stem.rsplit("-", 1)[1]): path for path in runs}
    assert sorted(numbers) == [trial.number for trial in result.trials]
    for trial in result.trials:
        told = wandb_records(numbers[trial.number])
        steps = [record.history.step.num for record in told if record.HasField("history")]
        assert steps == list(range(4, trial.steps + 1, 4))
        assert [record.exit.exit_code for record in told if record.HasField("exit")] == [0]


def test_the_best_adapter_is_published_with_its_recipe_and_full_metrics(
    searched: tuple[Path, Path, TuneResult],
) -> None:
    _, home, result = searched
    stored = Store(home).open(result.artifact)
    assert stored.record.metrics["eval/loss"].rows == 24
    assert stored.record.recipe["method"]["r"] == result.best.params["method/r"]
    assert stored.record.recipe["train"]["lr"] == result.best.params["train/lr"]


def test_every_report_is_an_event(searched: tuple[Path, Path, TuneResult]) -> None:
    _, _, result = searched
    events = read_events(Path(result.folder) / "events.jsonl")
    for trial in result.trials:
        steps = [
            e["steps"] for e in events if e["event"] == "report" and e["trial"] == trial.number
        ]
        assert steps == list(range(4, trial.steps + 1, 4))
    assert sum(e["event"] == "end" for e in events) == 6


def test_a_finished_study_is_returned_and_a_larger_budget_continues_it(
    searched: tuple[Path, Path, TuneResult],
) -> None:
    recipe, home, result = searched
    again = tune(load_recipe(recipe), home=home)
    assert again.num_run == 0
    assert again.trials == result.trials
    assert again.artifact == result.artifact
    more = tune(load_recipe(recipe, ["search.trials=7"]), home=home)
    assert more.num_run == 1
    assert more.trials[:6] == result.trials


def test_another_space_under_the_same_name_is_refused(
    searched: tuple[Path, Path, TuneResult],
) -> None:
    recipe, home, _ = searched
    with pytest.raises(ConfigError, match="another space"):
        tune(load_recipe(recipe, ["train.batch_size=5"]), home=home)


def test_a_trial_that_has_learned_enough_is_complete(
    model_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(
        tmp_path,
        model_folder,
        data_folder,
        method={"type": "mixture", "num_experts": 2, "r": {"choice": [2, 4]}},
        train={"steps": 8, "batch_size": 4, "report_every": 4, "stop_at_loss": 100.0},
        search={"trials": 1, "scheduler": {"type": "none"}, "eval_rows": 8},
    )
    (trial,) = tune(load_recipe(recipe), home=tmp_path / "home").trials
    assert (trial.state, trial.steps) == ("complete", 4)
    assert 0.5 <= trial.metrics["method/top_expert_load"] <= 1.0


def test_a_broken_trial_is_told_failed_with_its_reason(
    model_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    lrs = [1e30, 1e-3]
    recipe = write_recipe(
        tmp_path,
        model_folder,
        data_folder,
        method={"type": "lora"},
        train={
            "steps": 8,
            "batch_size": 4,
            "report_every": 4,
            "lr": {"choice": lrs},
            "max_grad_norm": 1e30,
        },
        search={
            "trials": 2,
            "points": [{"train.lr": lr} for lr in lrs],
            "scheduler": {"type": "none"},
            "eval_rows": 8,
        },
    )
    result = tune(load_recipe(recipe), home=tmp_path / "home")
    assert [t.state for t in result.trials] == ["failed", "complete"]
    assert "not finite" in str(result.trials[0].reason)
    assert result.best.number == 1


def test_more_workers_than_the_cluster_has_are_never_launched(
    model_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(
        tmp_path,
        model_folder,
        data_folder,
        method={"type": "lora"},
        train={"steps": 4, "batch_size": 4, "report_every": 4},
        scale={"workers": {"choice": [4, 1]}},
        search={
            "trials": 1,
            "points": [{"scale.workers": 4}, {"scale.workers": 1}],
            "eval_rows": 8,
        },
    )
    result = tune(load_recipe(recipe), home=tmp_path / "home")
    (trial,) = result.trials
    assert (trial.state, trial.params["scale/workers"]) == ("complete", 1)
    assert result.num_infeasible == 1
