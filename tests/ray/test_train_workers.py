import gc
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from graft.core.errors import ConfigError, DataError
from graft.core.progress import Progress, Task
from graft.engine.multi import MultiAdapterModel
from graft.engine.run import load_run, read_result, train_run
from graft.engine.run_folder import read_reports
from graft.pipelines.train import train
from graft.recipe import Recipe, load_recipe
from graft.runtime.session import ray_session
from graft.runtime.shared_rows import share_rows
from graft.runtime.train_workers import train_on_workers

pytestmark = [
    pytest.mark.ray,
    # Ray's own modules set options that Ray has deprecated.
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\."),
]


@pytest.fixture(scope="module")
def ray_cpus() -> Iterator[int]:
    """CPUs of the session; joins the one that other modules share, if there is one."""
    import ray

    with ray_session(num_cpus=2):
        yield int(ray.cluster_resources()["CPU"])


def recipe_for(model_folder: Path, data_folder: Path, **sections: Any) -> Recipe:
    content: dict[str, Any] = {
        "model": {"source": str(model_folder), "dtype": "fp32"},
        "data": {
            "train": str(data_folder / "train.jsonl"),
            "eval": str(data_folder / "eval.jsonl"),
        },
        "method": {"type": "lora", "r": 4, "lora_dropout": 0.1},
        "train": {
            "steps": 6,
            "batch_size": 7,
            "lr": 5e-3,
            "micro_batch_tokens": 60,
            "report_every": 1,
        },
        "scale": {"workers": 2, "zero_stage": 2},
    }
    return Recipe.model_validate({**content, **sections})


def test_two_workers_under_zero_2_lose_as_one_process_does_at_every_step(
    tmp_path: Path, model_folder: Path, data_folder: Path, ray_cpus: int
) -> None:
    data = shutil.copytree(data_folder, tmp_path / "data")
    recipe = recipe_for(model_folder, data)
    run = load_run(recipe, tmp_path)
    train_run(run, tmp_path / "one", home=tmp_path, eval_rows=8)
    shutil.rmtree(data)  # the workers read what this process has prepared
    rows = share_rows({recipe.objective.row_key: run.prepared})
    result = train_on_workers(
        recipe, home=tmp_path, folder=tmp_path / "two", eval_rows=8, rows=rows
    )
    alone, workers = read_reports(tmp_path / "one"), read_reports(tmp_path / "two")
    assert [report["steps"] for report in workers] == [1, 2, 3, 4, 5, 6]
    for given, expected in zip(workers, alone, strict=True):
        assert given["tokens"] == expected["tokens"]
        assert given["train/loss"] == pytest.approx(expected["train/loss"], abs=1e-4)
        assert given["train/grad_norm"] == pytest.approx(expected["train/grad_norm"], rel=1e-3)
        assert given["eval/loss"] == pytest.approx(expected["eval/loss"], abs=1e-4)
    assert alone[-1]["train/loss"] < alone[0]["train/loss"]
    assert result == read_result(tmp_path / "two")
    assert result.metrics["eval/loss"] == workers[-1]["eval/loss"]


def test_more_workers_than_cpus_are_refused_in_words(
    tmp_path: Path, model_folder: Path, data_folder: Path, ray_cpus: int
) -> None:
    recipe = recipe_for(model_folder, data_folder, scale={"workers": ray_cpus + 1})
    with pytest.raises(ConfigError, match=rf"scale.workers is {ray_cpus + 1}.* {ray_cpus} CPUs"):
        train_on_workers(recipe, home=tmp_path, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_disk_that_is_not_there_is_refused_before_workers_start(
    tmp_path: Path, model_folder: Path, data_folder: Path, ray_cpus: int
) -> None:
    offload = {"parameters": "nvme", "nvme_path": str(tmp_path / "away")}
    scale = {"workers": 2, "zero_stage": 3, "offload": offload}
    recipe = recipe_for(model_folder, data_folder, scale=scale)
    with pytest.raises(ConfigError, match=r"node .*nvme_path: there is no folder .*away; make it"):
        train_on_workers(recipe, home=tmp_path, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


class CountsBases(Progress):
    """Counts the bases that this process holds at every report of a training."""

    def __init__(self) -> None:
        self.counted: list[int] = []

    def task(self, label: str, total: float | None = None, unit: str = "step") -> Task:
        counted = self.counted

        class Counting(Task):
            def advance(self, amount: float = 1, **fields: float | str) -> None:
                if label.startswith("training"):
                    counted.append(num_bases())

        return Counting()


def num_bases() -> int:
    gc.collect()
    return sum(type(known) is MultiAdapterModel for known in gc.get_objects())


@pytest.mark.slow
def test_the_driver_holds_no_base_while_its_workers_train(
    tmp_path: Path, model_folder: Path, data_folder: Path, ray_cpus: int
) -> None:
    recipe = recipe_for(model_folder, data_folder)
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe.model_dump(mode="json", exclude_unset=True)))
    before, progress = num_bases(), CountsBases()
    result = train(load_recipe(path), home=tmp_path / "home", progress=progress)
    assert result.metrics["eval/loss"].rows == 24
    assert progress.counted
    assert set(progress.counted) == {before}


@pytest.mark.slow
def test_an_error_in_a_worker_arrives_as_it_was_raised(
    tmp_path: Path, model_folder: Path, ray_cpus: int
) -> None:
    recipe = recipe_for(model_folder, tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"nowhere/train\.jsonl"):
        train_on_workers(recipe, home=tmp_path, folder=tmp_path / "run")
