import os
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from graft.core.errors import ConfigError, TrainingError
from graft.core.progress import Progress, Task
from graft.core.signals import told_to_end
from graft.engine.backends.torch import TorchBackend
from graft.engine.checkpoint import newest_checkpoint
from graft.engine.run import load_run, train_run
from graft.engine.run_folder import CHECKPOINTS, read_reports
from graft.pipelines.train import train
from graft.recipe import RecipeSpace, load_recipe

STEPS = 7


@pytest.fixture
def space(tmp_path: Path, model_folder: Path, data_folder: Path) -> RecipeSpace:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "name: tiny\n"
        f"model: {{source: {model_folder}, dtype: fp32}}\n"
        f"data: {{train: {data_folder}/train.jsonl, eval: {data_folder}/eval.jsonl}}\n"
        "method: {type: lora, r: 4, lora_dropout: 0.1}\n"
        f"train: {{steps: {STEPS}, batch_size: 4, lr: 5.0e-3, report_every: 3}}\n"
    )
    return load_recipe(path)


def learned(folder: Path) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Reports without what the clock says, and the weights."""
    timed = ("seconds", "train/tokens_per_s")
    reports = [{k: v for k, v in r.items() if k not in timed} for r in read_reports(folder)]
    found = newest_checkpoint(folder / CHECKPOINTS)
    assert found is not None
    weights = {f"{s}.{k}": v for s, of in found[0].tensors.items() for k, v in of.items()}
    return reports, weights


@pytest.mark.parametrize("step", range(1, STEPS))
def test_a_run_that_leaves_after_any_step_goes_on_from_that_step_to_the_same_end(
    step: int, space: RecipeSpace, tmp_path: Path
) -> None:
    run = load_run(space.recipe(), tmp_path)
    assert train_run(run, tmp_path / "whole", home=tmp_path)
    run.model.remove_slot("adapter")
    done: list[int] = []
    is_complete = train_run(
        run,
        tmp_path / "parts",
        home=tmp_path,
        on_step=lambda report: done.append(report.step),
        leaves=lambda: len(done) == step,
    )
    assert not is_complete
    run.model.remove_slot("adapter")
    assert train_run(
        run,
        tmp_path / "parts",
        home=tmp_path,
        on_step=lambda report: done.append(report.step),
        leaves=lambda: False,
    )
    assert done == list(range(1, STEPS + 1))
    reports, weights = learned(tmp_path / "parts")
    expected_reports, expected_weights = learned(tmp_path / "whole")
    assert reports == expected_reports
    assert [report["steps"] for report in reports] == [3, 6, 7]
    assert all(torch.equal(weights[key], value) for key, value in expected_weights.items())


def test_a_run_whose_checkpoints_were_removed_leaves_none_behind(
    space: RecipeSpace, tmp_path: Path
) -> None:
    """As of a trial that is stopped for good, before its workers have left."""
    run = load_run(space.recipe(), tmp_path)

    def leaves() -> bool:
        if len(read_reports(tmp_path / "own")) < 1:
            return False
        shutil.rmtree(tmp_path / "own" / CHECKPOINTS)
        return True

    assert not train_run(run, tmp_path / "own", home=tmp_path, leaves=leaves)
    assert not (tmp_path / "own" / CHECKPOINTS).exists()


class OneOfTwo(TorchBackend):
    """A worker that is a thread."""

    world_size = 2

    def __init__(self, rank: int, meet: threading.Barrier, given: dict[int, torch.Tensor]) -> None:
        super().__init__()
        self.world_rank, self._meet, self._given = rank, meet, given

    def all_reduce_sum(self, value: torch.Tensor) -> torch.Tensor:
        self._given[self.world_rank] = value.clone()
        self._meet.wait(20)
        total = self._given[0] + self._given[1]
        self._meet.wait(20)
        return total


def test_workers_whose_nodes_do_not_share_the_folder_are_refused(
    space: RecipeSpace, tmp_path: Path
) -> None:
    meet, given = threading.Barrier(2), dict[int, torch.Tensor]()
    folders = [tmp_path / "first", tmp_path / "second"]
    runs = [load_run(space.recipe(), tmp_path) for _ in folders]
    assert not train_run(runs[0], folders[0], home=tmp_path, leaves=lambda: True)
    runs[0].model.remove_slot("adapter")

    def work(rank: int) -> None:
        backend = OneOfTwo(rank, meet, given)
        train_run(runs[rank], folders[rank], home=tmp_path, backend=backend)

    with ThreadPoolExecutor(2) as threads:
        for rank, done in enumerate([threads.submit(work, rank) for rank in (0, 1)]):
            with pytest.raises(TrainingError) as refused:
                done.result()
            words = str(refused.value)
            assert f"different checkpoints in {folders[rank]}" in words
            assert "worker 0 step 1, worker 1 step 0" in words
            assert "must be shared by all nodes" in words


class EndsAfter(Progress):
    """Sends this process SIGTERM when training has done so many steps."""

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def task(self, label: str, total: float | None = None, unit: str = "step") -> Task:
        steps = self._steps

        class Ending(Task):
            done = 0.0

            def advance(self, amount: float = 1, **fields: float | str) -> None:
                self.done += amount
                if label.startswith("training") and self.done == steps:
                    os.kill(os.getpid(), signal.SIGTERM)

        return Ending()


def test_a_training_told_to_end_keeps_its_step_and_the_same_call_goes_on(
    space: RecipeSpace, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    with pytest.raises(TrainingError, match=r"told to end \(SIGTERM\); step 4 is kept"):
        train(space, home=home, progress=EndsAfter(4))
    assert newest_checkpoint(home / "runs" / "tiny" / CHECKPOINTS)[0].step == 4  # type: ignore[index]
    broken = train(space, home=home)
    whole = train(space, home=tmp_path / "another")
    assert broken.loss == whole.loss
    assert broken.metrics == whole.metrics


def test_sigterm_is_a_question_only_while_it_is_asked() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with told_to_end() as leaves:
        assert not leaves()
        os.kill(os.getpid(), signal.SIGTERM)
        assert leaves()
    assert signal.getsignal(signal.SIGTERM) is before


def test_another_thread_hears_no_signal() -> None:
    heard: list[bool] = []

    def ask() -> None:
        with told_to_end() as leaves:
            heard.append(leaves())

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert heard == [False]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("scale.workers=[4, 2]", r"\[min, max\] the wrong way round; write \[2, 4\]"),
        ("scale.workers=[0, 2]", r"scale\.workers"),
        ("scale.workers=[1, 2, 3]", r"scale\.workers"),
        ("scale.workers=[1, 5]", r"train\.batch_size 4 is below scale\.workers 5"),
        ("scale={workers: [1, 2], backend: torch}", "workers 2 needs `backend: deepspeed`"),
    ],
)
def test_a_range_of_workers_that_cannot_be_is_refused_in_words(
    setting: str, words: str, space: RecipeSpace, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        load_recipe(tmp_path / "recipe.yaml", [setting])


def test_a_range_of_workers_survives_its_file(space: RecipeSpace, tmp_path: Path) -> None:
    recipe = load_recipe(tmp_path / "recipe.yaml", ["scale.workers=[1, 4]"]).recipe()
    assert (recipe.scale.min_workers, recipe.scale.max_workers) == (1, 4)
    assert recipe.scale.needs_deepspeed
    assert type(recipe).model_validate_json(recipe.model_dump_json()) == recipe
