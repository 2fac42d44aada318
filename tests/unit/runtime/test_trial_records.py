"""What a study knows of its trials without reading them again: the same, and as much of many."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import optuna
import pytest

from graft.core.pareto import dominates
from graft.core.progress import LiveTable, Progress
from graft.core.spaces import Float
from graft.engine.run_folder import CHECKPOINTS
from graft.recipe.search import SearchSection
from graft.recipe.sections import Recipe
from graft.runtime.budget import Budget
from graft.runtime.samplers import seeded_sampler
from graft.runtime.searcher import drop_needless_checkpoints
from graft.runtime.storage import Kept
from graft.runtime.study import Study, open_study, read_study
from graft.runtime.trial_table import MAX_ROWS, TrialTable
from graft.runtime.trials import STOPPED_BY_PERSON, StudyFacts

LR = Float(low=1e-5, high=1e-1, log=True)
FACTS = StudyFacts(
    space="space",
    model="model",
    data="data",
    objectives=("eval/loss min", "cost/adapter_bytes min"),
    eval_rows=64,
)


class Rates:
    """A learning rate, of which the largest are impossible."""

    def sample(self, suggest: Any) -> Recipe:
        lr = suggest("train/lr", LR)
        return Recipe.model_validate(
            {
                "model": {"source": "x"},
                "data": {"train": "t", "eval": "e"},
                "method": {"type": "lora"},
                "train": {"lr": lr},
            }
        )


class Counting:
    """A storage that counts the trials that are read of it."""

    def __init__(self, storage: Any) -> None:
        self._storage = storage
        self.num_read = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def get_trial(self, trial_id: int) -> Any:
        self.num_read += 1
        return self._storage.get_trial(trial_id)

    def get_all_trials(self, *args: Any, **fields: Any) -> Any:
        found = self._storage.get_all_trials(*args, **fields)
        self.num_read += len(found)
        return found


class Screen(Progress):
    """Somebody looks."""

    class Table(LiveTable):
        num_rows = 0

        def update(self, headings: Any, rows: Any, marked: int | None = None) -> None:
            self.num_rows = len(rows)

    def __init__(self) -> None:
        self.shown = Screen.Table()

    def table(self, title: str) -> LiveTable:
        return self.shown


def storage_of(kind: str, folder: Path) -> Any:
    if kind == "database":
        return optuna.storages.get_storage("sqlite:///:memory:")
    folder.mkdir()
    backend = optuna.storages.journal.JournalFileBackend(str(folder / "study.journal"))
    return optuna.storages.JournalStorage(backend)


def study_of(num_ended: int, storage: Any, folder: Path) -> Study:
    """A study in which so many trials have ended, one in four of them complete."""
    section = SearchSection(trials=num_ended + 2, sampler="random")
    own = optuna.create_study(storage=storage, study_name="s", sampler=seeded_sampler(section))
    scale = optuna.distributions.FloatDistribution(LR.low, LR.high, log=True)
    for number in range(num_ended):
        facts = {"metrics": {"eval/loss": 1.0 + number}, "steps": 8, "executor": "packed"}
        is_complete = number % 4 == 0
        own.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState[("PRUNED", "COMPLETE")[is_complete]],
                params={"train/lr": 1e-3},
                distributions={"train/lr": scale},
                value=1.0 + number if is_complete else None,
                user_attrs=facts,
            )
        )
    return Study(folder, Kept(storage, "s"), own, section, drives=True)


def reads(num_ended: int, kind: str, folder: Path) -> list[int]:
    """How many trials are read at each thing that is done of one more trial."""
    storage, screen = Counting(storage_of(kind, folder)), Screen()
    study = study_of(num_ended, storage, folder)
    budget, table, counts = Budget(study), TrialTable(study, screen), []
    assert table.open()
    drop_needless_checkpoints(study)

    def count(*_: object) -> None:
        counts.append(storage.num_read)
        storage.num_read = 0

    count()
    asked = study.ask(Rates())
    assert asked is not None
    count(study.note(asked.number, executor="packed"))
    for step in (4, 8):
        count(study.report(asked.number, step, {"eval/loss": 0.5}))
        count(study.note(asked.number, seconds=1.0, tokens=step))
        count(budget.count(asked.number, step), budget.spent, budget.spending)
        count(table.redraw())
    assert screen.shown.num_rows == MAX_ROWS
    count(study.tell(asked.number, "complete"))
    count(drop_needless_checkpoints(study), study.trial(asked.number), study.best())
    count(study.has_work, study.num_remaining, study.front(), study.records.unfinished)
    return counts[1:]


@pytest.mark.parametrize("kind", ["journal", "database"])
def test_of_many_trials_no_more_is_read_than_of_few(kind: str, tmp_path: Path) -> None:
    few, many = (reads(num, kind, tmp_path / str(num)) for num in (25, 250))
    assert few == many
    of_report = few[1:5]
    assert of_report == [1, 1, 0, 0]


def test_a_driver_knows_what_a_reader_finds(tmp_path: Path) -> None:
    rng, section = (
        random.Random(0),
        SearchSection.model_validate(
            {
                "trials": 60,
                "sampler": "random",
                "objectives": [
                    {"metric": "eval/loss", "mode": "min"},
                    {"metric": "cost/adapter_bytes", "mode": "min"},
                ],
            }
        ),
    )
    with open_study(tmp_path / "study", section, FACTS) as study:
        onlooker = read_study(tmp_path / "study", section)
        study.enqueue([{"train/lr": 1e-4}, {"train/lr": 1e-3}])
        for _ in range(30):
            act(study, rng)
            assert study.trials == onlooker.trials
            assert_consistent(study)
            assert_consistent(onlooker)
        assert {t.state for t in study.trials} == {
            "complete", "stopped", "failed", "infeasible", "running"
        }  # fmt: skip
        assert any(t.continued_by is not None for t in study.trials)
    with open_study(tmp_path / "study", section, FACTS) as again:
        assert again.trials == onlooker.trials


def act(study: Study, rng: random.Random) -> None:
    """Runs a trial, or lets one go on."""
    stopped = [t.number for t in study.trials if t.may_go_on and t.continued_by is None]
    if stopped and rng.random() < 0.3:
        number = study.resume(stopped[0])
        assert study.take_up(number, Rates()) is not None
    else:
        asked = study.ask(Rates())
        assert asked is not None
        number = asked.number
        (study.trial_folder(number) / CHECKPOINTS).mkdir(parents=True)
        study.note(number, executor="packed")
    metrics = {"eval/loss": rng.randrange(9) / 10, "cost/adapter_bytes": float(rng.randrange(9))}
    study.report(number, 4, metrics)
    end = rng.choice(["complete", "complete", "stopped", "person", "failed", "infeasible", ""])
    if end == "infeasible":
        study.refuse(number, "out of memory")
    elif end == "person":
        study.tell(number, "stopped", reason=STOPPED_BY_PERSON)
    elif end:
        study.tell(number, end)


def assert_consistent(study: Study) -> None:
    """Compares what is counted with what a count says."""
    records, trials = study.records, study.trials
    assert records.num_used == sum(t.uses_budget for t in trials)
    assert records.num_ended == sum(t.has_ended for t in trials)
    assert records.unfinished == [t for t in trials if t.is_unfinished]
    complete = {
        t.number: (t.metrics["eval/loss"], t.metrics["cost/adapter_bytes"])
        for t in trials
        if t.state == "complete"
    }
    best = [
        n for n, own in complete.items() if not any(dominates(o, own) for o in complete.values())
    ]
    assert [t.number for t in study.front()] == best


def test_only_those_that_nobody_goes_on_from_lose_their_state(tmp_path: Path) -> None:
    section = SearchSection(trials=9, sampler="random")
    facts = FACTS.model_copy(update={"objectives": ("eval/loss min",)})
    with open_study(tmp_path / "study", section, facts) as study:
        needless = []
        for loss, end in (
            (0.5, "complete"),
            (0.4, "stopped"),
            (0.4, "failed"),
            (0.5, "complete"),  # as good as the first
            (0.3, "complete"),  # better
            (0.1, ""),
        ):
            asked = study.ask(Rates())
            assert asked is not None
            study.note(asked.number, executor="packed")
            study.report(asked.number, 4, {"eval/loss": loss})
            if end:
                study.tell(asked.number, end)  # type: ignore[arg-type]
            needless.append(study.records.take_needless())
    assert needless == [[], [1], [], [3], [0], []]
    with open_study(tmp_path / "study", section, facts) as again:
        assert again.records.take_needless() == [0, 1, 3]  # the last driver may have died before


def test_a_trial_that_somebody_ended_in_a_dashboard_stays_as_it_is(tmp_path: Path) -> None:
    section = SearchSection(trials=2, sampler="random")
    facts = FACTS.model_copy(update={"objectives": ("eval/loss min",)})
    with open_study(tmp_path / "study", section, facts) as study:
        asked = study.ask(Rates())
        assert asked is not None
        other = storage_of_folder(tmp_path / "study")
        other.set_trial_state_values(0, optuna.trial.TrialState.FAIL)
        study.tell(asked.number, "complete")
        assert study.trial(asked.number).state == "failed"
        assert not study.records.unfinished


def storage_of_folder(folder: Path) -> Any:
    """A study's journal as another program opens it."""
    path = str(folder / "study.journal")
    backend = optuna.storages.journal.JournalFileBackend(path)
    return optuna.storages.JournalStorage(backend)
