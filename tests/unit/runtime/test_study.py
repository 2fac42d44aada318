"""The study of record: truthful states, the same points after a crash, journals that heal."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from graft.core.errors import ConfigError, TrainingError
from graft.core.spaces import Choice, Float, Int
from graft.recipe.search import SearchSection
from graft.recipe.sections import Recipe
from graft.runtime.journal import JOURNAL
from graft.runtime.study import Study, open_study, read_study
from graft.runtime.trials import StudyFacts

FACTS = StudyFacts(
    space="space", model="model", data="data", objectives=("eval/loss min",), eval_rows=64
)


class Conditional:
    """Two branches with a parameter each; a learning rate that may be impossible."""

    def __init__(self, largest_lr: float = 1.0) -> None:
        self.largest_lr = largest_lr

    def sample(self, suggest: Any) -> Recipe:
        branch = suggest("method", Choice(values=("narrow", "wide")))
        r = suggest(f"method[{branch}]/r", Int(low=1, high=4 if branch == "narrow" else 64))
        lr = suggest("train/lr", Float(low=1e-5, high=1e-1, log=True))
        if lr > self.largest_lr:
            raise ConfigError(f"learning rate {lr} is too large")
        return Recipe.model_validate(
            {
                "model": {"source": "x"},
                "data": {"train": "t", "eval": "e"},
                "method": {"type": "lora", "r": r},
                "train": {"lr": lr},
            }
        )


class Grid:
    """Six points."""

    def sample(self, suggest: Any) -> Recipe:
        r = suggest("method/r", Choice(values=(2, 4, 8)))
        steps = suggest("train/steps", Int(low=1, high=2))
        return Recipe.model_validate(
            {
                "model": {"source": "x"},
                "data": {"train": "t", "eval": "e"},
                "method": {"type": "lora", "r": r},
                "train": {"steps": steps},
            }
        )


def section(**fields: Any) -> SearchSection:
    return SearchSection.model_validate({"trials": 6, **fields})


@contextmanager
def opened(folder: Path, facts: StudyFacts = FACTS, **fields: Any) -> Iterator[Study]:
    with open_study(folder / "study", section(**fields), facts) as study:
        yield study


def run_trial(study: Study, space: Any, loss: float, outcome: Any = "complete") -> int:
    asked = study.ask(space)
    assert asked is not None
    study.report(asked.number, 10, {"eval/loss": loss, "train/loss": 2 * loss})
    study.tell(asked.number, outcome)
    return asked.number


def test_states_are_told_as_they_were(tmp_path: Path) -> None:
    with opened(tmp_path) as study:
        run_trial(study, Conditional(), 0.5)
        run_trial(study, Conditional(), 0.1, "stopped")
        run_trial(study, Conditional(), 0.2, "failed")
    with opened(tmp_path) as study:
        assert [t.state for t in study.trials] == ["complete", "stopped", "failed"]
        assert study.best().number == 0  # a stopped trial is no winner, however good it looked
        assert study.num_remaining == 3


def test_an_impossible_point_is_told_so_and_costs_no_budget(tmp_path: Path) -> None:
    with opened(tmp_path) as study:
        for _ in range(6):
            run_trial(study, Conditional(largest_lr=1e-3), 0.5)
        states = [t.state for t in study.trials]
        assert states.count("complete") == 6
        assert "infeasible" in states
        assert study.num_remaining == 0


def test_a_space_of_impossible_points_ends_with_the_reason(tmp_path: Path) -> None:
    with opened(tmp_path) as study, pytest.raises(ConfigError, match="is too large"):
        study.ask(Conditional(largest_lr=0.0))


def test_a_resumed_study_proposes_what_an_undisturbed_one_does(tmp_path: Path) -> None:
    losses = [0.9, 0.4, 0.7, 0.2, 0.6, 0.3, 0.8, 0.5, 0.45, 0.35, 0.25, 0.15]
    with opened(tmp_path / "whole", trials=12) as study:
        for loss in losses:
            run_trial(study, Conditional(), loss)
        whole = [t.params for t in study.trials]
    broken: list[dict[str, Any]] = []
    for loss in losses:
        with opened(tmp_path / "broken", trials=12) as study:
            run_trial(study, Conditional(), loss)
            broken = [t.params for t in study.trials]
    assert broken == whole


def test_a_trial_left_running_comes_back_with_its_own_recipe(tmp_path: Path) -> None:
    with opened(tmp_path) as study:
        run_trial(study, Conditional(), 0.5)
        asked = study.ask(Conditional())
        assert asked is not None
        study.report(asked.number, 10, {"eval/loss": 0.4})
    with opened(tmp_path) as study:
        (again,) = study.unfinished(Conditional())
        assert again == asked
        assert study.num_remaining == 4
        study.tell(again.number, "stopped")
        assert study.unfinished(Conditional()) == []


def test_points_come_first_and_only_once(tmp_path: Path) -> None:
    points = [{"method": "wide", "method[wide]/r": 33, "train/lr": 1e-3}, {"method": "narrow"}]
    with opened(tmp_path) as study:
        study.enqueue(points)
        first = study.ask(Conditional())
        assert first is not None
        assert first.params == points[0]
    with opened(tmp_path) as study:
        study.enqueue(points)
        second = study.ask(Conditional())
        assert second is not None
        assert second.number == 1
        assert second.params["method"] == "narrow"
        third = study.ask(Conditional())
        assert third is not None
        assert third.params != points[0]


@pytest.mark.parametrize("torn", [b'{"op_code": 8, "worker_id": "to', b"\0" * 99, b"[]\n"])
def test_a_torn_last_line_is_dropped_and_the_study_goes_on(tmp_path: Path, torn: bytes) -> None:
    with opened(tmp_path) as study:
        run_trial(study, Conditional(), 0.5)
    journal = tmp_path / "study" / JOURNAL
    whole = journal.read_bytes()
    with journal.open("ab") as file:
        file.write(torn)
    journal.with_name(f"{JOURNAL}.lock").write_text("")  # left by a process killed while writing
    with opened(tmp_path) as study:
        assert journal.read_bytes().startswith(whole + b'{"op_code"')
        run_trial(study, Conditional(), 0.4)
        assert [t.state for t in study.trials] == ["complete", "complete"]


def test_a_torn_last_line_does_not_keep_a_reader_out(tmp_path: Path) -> None:
    with opened(tmp_path) as study:
        run_trial(study, Conditional(), 0.5)
    journal = tmp_path / "study" / JOURNAL
    with journal.open("ab") as file:
        file.write(b'{"op_code": 8, "worker_id": "to')
    torn = journal.read_bytes()
    assert [t.state for t in read_study(tmp_path / "study", section()).trials] == ["complete"]
    assert journal.read_bytes() == torn  # only a driver mends it


def test_a_journal_without_its_first_line_is_no_study_yet(tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / JOURNAL).write_bytes(b"")
    with pytest.raises(ConfigError, match=r"no study in .* yet"):
        read_study(tmp_path / "study", section())


def test_a_journal_cut_at_any_byte_opens(tmp_path: Path) -> None:
    with opened(tmp_path) as study:
        run_trial(study, Conditional(), 0.5)
        study.ask(Conditional())
    whole = (tmp_path / "study" / JOURNAL).read_bytes()
    for cut in range(0, len(whole), 97):
        folder = tmp_path / f"cut-{cut}"
        (folder / "study").mkdir(parents=True)
        (folder / "study" / JOURNAL).write_bytes(whole[:cut])
        with opened(folder) as study:
            for asked in study.unfinished(Conditional()):
                study.tell(asked.number, "stopped")
            run_trial(study, Conditional(), 0.3)
            assert study.best().metrics["eval/loss"] in (0.3, 0.5)


@pytest.mark.parametrize("line", [b"{torn\n", b"[1]\n", b'{"op": 4}\n', b"\n"])
def test_damage_before_the_end_is_refused_in_words(tmp_path: Path, line: bytes) -> None:
    with opened(tmp_path) as study:
        run_trial(study, Conditional(), 0.5)
    journal = tmp_path / "study" / JOURNAL
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:2], line, *lines[2:]]))
    with pytest.raises(ConfigError, match=r"damaged at line 3"), opened(tmp_path):
        pass
    with pytest.raises(ConfigError, match=r"damaged at line 3; restore the file"):
        read_study(tmp_path / "study", section())


def test_a_journal_that_is_no_file_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "study" / JOURNAL).mkdir(parents=True)
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"), opened(tmp_path):
        pass
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_study(tmp_path / "study", section())


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("space", "other", "another space"),
        ("model", "other", "another base model"),
        ("data", "other", "other data"),
        ("objectives", ("eval/loss max",), "search.objectives"),
        ("eval_rows", 8, "search.eval_rows"),
    ],
)
def test_another_recipe_on_the_same_study_is_refused(
    tmp_path: Path, field: str, value: Any, words: str
) -> None:
    with opened(tmp_path):
        pass
    changed = FACTS.model_copy(update={field: value})
    with pytest.raises(ConfigError, match=words), opened(tmp_path, changed):
        pass


def hold(folder: Path, ready: Any, done: Any) -> None:
    with opened(folder):
        ready.set()
        done.wait(120)


def test_a_second_driver_is_refused_and_named(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path, ready, done))
    other.start()
    try:
        assert ready.wait(120)
        with pytest.raises(ConfigError, match=f"process {other.pid} on"), opened(tmp_path):
            pass
    finally:
        done.set()
        other.join()
    with opened(tmp_path):
        pass


def test_a_killed_driver_leaves_a_lock_that_holds_nobody_up(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path, ready, done))
    other.start()
    assert ready.wait(120)
    other.kill()
    other.join()
    assert (tmp_path / "study" / "driver.lock").exists()
    with opened(tmp_path) as study:
        run_trial(study, Conditional(), 0.5)


def test_a_grid_tries_each_point_once_and_ends(tmp_path: Path) -> None:
    with opened(tmp_path, trials=20, sampler="grid") as study:
        seen = set()
        while (asked := study.ask(Grid())) is not None:
            seen.add(tuple(asked.params.values()))
            study.report(asked.number, 1, {"eval/loss": 0.5})
            study.tell(asked.number, "complete")
        assert len(seen) == 6
        assert sum(t.state == "complete" for t in study.trials) == 6


def test_a_grid_over_a_range_is_refused(tmp_path: Path) -> None:
    with (
        opened(tmp_path, sampler="grid") as study,
        pytest.raises(ConfigError, match="make it a choice"),
    ):
        study.ask(Conditional())


@pytest.mark.parametrize("sampler", ["random", "qmc", "tpe"])
def test_every_sampler_gives_the_same_points_to_the_same_seed(tmp_path: Path, sampler: str) -> None:
    seen = []
    for name in ("one", "two"):
        with opened(tmp_path / name, trials=10, sampler=sampler) as study:
            for index in range(10):
                run_trial(study, Conditional(), 1.0 / (index + 1))
            seen.append([t.params for t in study.trials])
    assert seen[0] == seen[1]
    assert len({str(params) for params in seen[0]}) == 10


def test_several_objectives_keep_what_no_other_trial_beats(tmp_path: Path) -> None:
    objectives = [
        {"metric": "eval/loss", "mode": "min"},
        {"metric": "eval/exact_match", "mode": "max"},
    ]
    facts = FACTS.model_copy(update={"objectives": ("eval/loss min", "eval/exact_match max")})
    scores = [(0.5, 0.5), (0.4, 0.2), (0.6, 0.4), (0.5, 0.5)]
    with opened(tmp_path, facts, objectives=objectives) as study:
        for loss, match in scores:
            asked = study.ask(Conditional())
            assert asked is not None
            study.report(asked.number, 5, {"eval/loss": loss, "eval/exact_match": match})
            study.tell(asked.number, "complete")
        assert [t.number for t in study.front()] == [0, 1, 3]
        assert study.best().number == 1


def test_a_trial_without_a_finite_metric_has_failed(tmp_path: Path) -> None:
    with opened(tmp_path) as study:
        run_trial(study, Conditional(), float("nan"))
        assert study.trials[0].state == "failed"
        with pytest.raises(TrainingError, match="no finite value of eval/loss"):
            study.best()
