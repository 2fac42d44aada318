"""A dedicated trial that finds no room is not to blame: it is run again, so many times."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayActorError

from graft.core.errors import NoRoomError, TrainingError
from graft.core.progress import Progress
from graft.engine.memory.cap import Limits, MemoryCap
from graft.engine.memory.shape import ModelShape
from graft.recipe.load import load_recipe, to_yaml
from graft.recipe.space import RecipeSpace
from graft.runtime.dedicated import DedicatedSeats, DedicatedTrial
from graft.runtime.packs import _in_words
from graft.runtime.search import take_turns
from graft.runtime.searcher import Executor, StudySearcher, TrialQueue
from graft.runtime.study import Study, open_study
from graft.runtime.trials import (
    Loss,
    StudyFacts,
    fail_trial,
    failure_of,
    lose_trial,
    loss_words,
    say_of_run,
    take_words,
)

FACTS = StudyFacts(
    space="space", model="model", data="data", objectives=("eval/loss min",), eval_rows=4
)


class Notes(Progress):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def space(model_folder: Path, data_folder: Path, tmp_path: Path) -> RecipeSpace:
    content: dict[str, Any] = {
        "model": {"source": str(model_folder), "dtype": "fp32", "device": "cpu"},
        "data": {
            "train": str(data_folder / "train.jsonl"),
            "eval": str(data_folder / "eval.jsonl"),
            "max_length": 64,
        },
        "method": {"type": "lora", "r": {"choice": [2, 4, 8, 16]}},
        "train": {"steps": 4, "batch_size": 2, "report_every": 2},
        "search": {"trials": 3, "sampler": "random", "executor": "dedicated", "eval_rows": 4},
        "eval": {"metrics": ["loss"]},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(content))
    return load_recipe(path)


@pytest.fixture
def study(space: RecipeSpace, tmp_path: Path) -> Iterator[Study]:
    with open_study(tmp_path / "study", space.sections().search, FACTS) as opened:
        yield opened


@pytest.fixture
def memory(model_folder: Path) -> MemoryCap:
    return MemoryCap(ModelShape.of(model_folder), Limits("cpu", 2**40))


def searcher_of(study: Study, queue: TrialQueue, notes: Progress) -> StudySearcher:
    assert queue.memory is not None
    return StudySearcher(queue, "dedicated", DedicatedSeats(study, queue.memory, notes))


def test_a_trial_is_told_what_is_to_be_free_as_other_trials_have_taught(
    study: Study, space: RecipeSpace, memory: MemoryCap
) -> None:
    queue = TrialQueue(study, space, turn=4, memory=memory)
    searcher = searcher_of(study, queue, Notes())
    config = searcher.suggest("a")
    assert isinstance(config, dict)
    recipe = space.fix(config["params"])
    found = memory.predict(recipe)
    assert config["needed_bytes"] == found.peak.total_bytes("device", exclude=["process"]) > 0
    memory.learn([recipe], 2 * found.device_bytes)
    again = searcher.suggest("b")
    assert isinstance(again, dict)
    assert again["needed_bytes"] > 2 * config["needed_bytes"] * 0.9


def test_a_trial_that_finds_no_room_is_told_nothing_and_taken_up_in_another_turn(
    study: Study, space: RecipeSpace, memory: MemoryCap
) -> None:
    queue, notes = TrialQueue(study, space, turn=4, memory=memory), Notes()
    searcher = searcher_of(study, queue, notes)
    lost, other = searcher.suggest("a"), searcher.suggest("b")
    assert isinstance(lost, dict)
    assert isinstance(other, dict)
    lose_trial(Path(lost["folder"]), "the memory of node n has 1 MB free")
    searcher.on_trial_complete("a", error=True)
    assert study.trial(lost["trial"]).state == "running"
    assert "taken up again: the memory of node n has 1 MB free" in notes.said[0]
    assert searcher.suggest("c") == "FINISHED"
    said = {"steps": 4, "seconds": 1.0, "eval/loss": 1.0, "train/loss": 1.0}
    searcher.on_trial_result("b", said)
    searcher.on_trial_complete("b", said)
    assert study.trial(other["trial"]).state == "complete"
    queue.refill()
    config = searcher_of(study, queue, notes).suggest("d")
    assert isinstance(config, dict)
    assert config["trial"] == lost["trial"]
    assert loss_words(Path(config["folder"])) is None


def test_a_trial_whose_process_died_is_not_to_blame_but_one_that_raised_is(
    study: Study, space: RecipeSpace, memory: MemoryCap
) -> None:
    searcher = searcher_of(study, TrialQueue(study, space, turn=4, memory=memory), Notes())
    first, second = searcher.suggest("a"), searcher.suggest("b")
    assert isinstance(first, dict)
    assert isinstance(second, dict)
    fail_trial(Path(first["folder"]), "worker 0: ZeroDivisionError")
    for name in "ab":
        searcher.on_trial_complete(name, error=True)
    assert study.trial(first["trial"]).state == "failed"
    assert study.trial(second["trial"]).state == "running"
    assert searcher.loss == Loss("its process died")


def test_a_device_that_stays_taken_ends_the_search_in_words_and_the_study_goes_on_later(
    study: Study, space: RecipeSpace, memory: MemoryCap
) -> None:
    queue, turns = TrialQueue(study, space, turn=4, memory=memory), 0

    def turn(executor: Executor) -> Loss | None:
        nonlocal turns
        turns += 1
        searcher = searcher_of(study, queue, Notes())
        config = searcher.suggest("a")
        assert isinstance(config, dict)
        lose_trial(Path(config["folder"]), "GPU 0 is held by python (process 7)")
        searcher.on_trial_complete("a", error=True)
        return searcher.loss

    with pytest.raises(TrainingError, match=r"lost 3 times in a row: GPU 0 is held .*process 7"):
        take_turns(queue, turn)
    assert turns == 3
    assert [trial.state for trial in study.trials] == ["running"]


def runner(folder: Path) -> DedicatedTrial:
    """A trial's runner without the run."""
    trial = DedicatedTrial.__new__(DedicatedTrial)
    trial._folder = folder
    return trial


def test_a_runner_tells_a_want_of_room_from_a_failure_of_the_trial(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).mkdir()
    runner(tmp_path / "a")._tell(NoRoomError("scale.workers needs 2 workers"))
    assert loss_words(tmp_path / "a") == "scale.workers needs 2 workers"
    assert failure_of(tmp_path / "a") is None
    runner(tmp_path / "b")._tell(TrainingError("the loss is not finite"))
    runner(tmp_path / "c")._tell(KeyError("x"))
    told = [failure_of(tmp_path / name) for name in "bc"]
    assert [failure and failure.reason for failure in told] == [
        "the loss is not finite",
        "KeyError('x')",
    ]
    assert loss_words(tmp_path / "b") is None


def test_words_of_a_run_are_taken_once_and_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert take_words(folder) == []
    say_of_run(folder, "first\nof two lines")
    say_of_run(folder, "second")
    assert take_words(folder) == ["first of two lines", "second"]
    assert take_words(folder) == []


def test_what_a_pack_raised_while_it_started_is_told_without_its_trace() -> None:
    trace = (
        "The actor died because of an error raised in its creation task, ray::PackActor()\n"
        '  File "free.py", line 1, in wait_until_free\n'
        "graft.core.errors.NoRoomError: GPU 0 is held by python (process 7): end it"
    )
    error = _in_words(RayActorError(error_msg=trace))
    assert str(error) == "GPU 0 is held by python (process 7): end it"
    killed = RayActorError(error_msg="The actor died.\nThe node was low on memory.")
    assert str(_in_words(killed)) == str(killed)
