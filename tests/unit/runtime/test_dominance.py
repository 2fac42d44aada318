"""Which trials are stopped where several metrics are searched: worked by hand, and against ASHA."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import AsyncHyperBandScheduler

from graft.core.events import EventLog
from graft.engine.run_folder import REPORTS_FILE
from graft.recipe.search import AshaScheduler, SearchObjective
from graft.runtime.dominance import DominanceRungs
from graft.runtime.scheduler import StudyScheduler

LOSS = SearchObjective(metric="eval/loss", mode="min")
MATCH = SearchObjective(metric="eval/exact_match", mode="max")
BYTES = SearchObjective(metric="cost/adapter_bytes", mode="min")
LATENCY = SearchObjective(metric="cost/latency_ms", mode="min")
ASHA = AshaScheduler(grace_steps=10)


def report(steps: int, loss: float, size: float) -> dict[str, Any]:
    return {"steps": steps, "eval/loss": loss, "cost/adapter_bytes": size}


def trial(folder: Path, number: int) -> Any:
    own = str(folder / str(number))
    return SimpleNamespace(trial_id=f"t{number}", config={"folder": own, "origin": own})


def decide(scheduler: StudyScheduler, trial: Any, said: dict[str, Any]) -> str:
    scheduler.on_trial_add(None, trial)
    return scheduler.on_trial_result(None, trial, said)


def decisions(folder: Path, objectives: list[SearchObjective], *said: dict[str, Any]) -> list[str]:
    scheduler = StudyScheduler(ASHA, objectives, 40, {})
    return [decide(scheduler, trial(folder, n), each) for n, each in enumerate(said)]


def test_a_cheap_trial_is_stopped_by_a_better_one_that_costs_no_more(tmp_path: Path) -> None:
    """By bytes alone trial 1 is in the better half: by that rule it could never be stopped."""
    found = decisions(
        tmp_path,
        [LOSS, BYTES],
        report(10, 0.5, 100),  # alone
        report(10, 0.9, 50),  # the smallest so far: front 0
        report(10, 0.4, 400),  # the best so far: front 0
        report(10, 0.95, 50),  # as small as trial 1 and worse: front 1, behind 3 of 4, 2 may go on
        report(10, 0.6, 60),  # smaller than trial 0, better than trial 1: front 0
    )
    assert found == ["CONTINUE", "CONTINUE", "CONTINUE", "STOP", "CONTINUE"]


def test_a_dominated_trial_goes_on_while_few_are_in_better_fronts(tmp_path: Path) -> None:
    found = decisions(
        tmp_path,
        [LOSS, BYTES],
        report(10, 0.5, 100),
        report(10, 0.7, 200),  # front 1, behind 1 of 2, where 1 may go on: stopped
        report(10, 0.8, 300),  # front 2, behind 2 of 3, where 2 may go on: stopped
        report(10, 0.6, 150),  # front 1, behind trial 0 alone, where 2 of 4 may go on
    )
    assert found == ["CONTINUE", "STOP", "STOP", "CONTINUE"]


def test_equal_trials_are_in_one_front(tmp_path: Path) -> None:
    same = [report(10, 0.5, 100)] * 3
    assert decisions(tmp_path, [LOSS, BYTES], *same) == ["CONTINUE"] * 3


def test_more_of_a_maximised_metric_is_better(tmp_path: Path) -> None:
    found = decisions(
        tmp_path,
        [MATCH, BYTES],
        {"steps": 10, "eval/exact_match": 0.8, "cost/adapter_bytes": 10},
        {"steps": 10, "eval/exact_match": 0.9, "cost/adapter_bytes": 10},
        {"steps": 10, "eval/exact_match": 0.1, "cost/adapter_bytes": 10},
    )
    assert found == ["CONTINUE", "CONTINUE", "STOP"]


def test_a_report_without_a_number_decides_nothing(tmp_path: Path) -> None:
    found = decisions(
        tmp_path,
        [LOSS, BYTES],
        report(10, 0.5, 100),
        report(10, float("nan"), 200),
        {"steps": 10, "cost/adapter_bytes": 200},
        report(10, 0.6, 200),
    )
    assert found == ["CONTINUE", "CONTINUE", "CONTINUE", "STOP"]


def test_a_cost_of_the_end_has_no_say_at_a_rung(tmp_path: Path) -> None:
    """Beside the loss alone it leaves Tune's own ASHA."""
    said = [{"steps": 10, "eval/loss": loss} for loss in (0.5, 0.9, 0.2)]
    with_latency = decisions(tmp_path, [LOSS, LATENCY], *said)
    assert with_latency == decisions(tmp_path, [LOSS], *said) == ["CONTINUE", "STOP", "CONTINUE"]


def test_rungs_come_back_from_the_reports_of_an_earlier_driver(tmp_path: Path) -> None:
    for number, (loss, size) in enumerate([(0.5, 100), (0.9, 50), (0.4, 400)]):
        EventLog(tmp_path / str(number) / REPORTS_FILE).append("report", **report(10, loss, size))
    ended = {tmp_path / str(n): (tmp_path / str(n), 40) for n in range(3)}
    again = StudyScheduler(ASHA, [LOSS, BYTES], 40, ended)
    assert decide(again, trial(tmp_path, 3), report(10, 0.95, 50)) == "STOP"
    assert decide(again, trial(tmp_path, 4), report(10, 0.6, 60)) == "CONTINUE"


def test_a_resumed_trial_keeps_the_rung_that_it_passed(tmp_path: Path) -> None:
    EventLog(tmp_path / "5" / REPORTS_FILE).append("report", **report(10, 0.9, 100))
    scheduler = StudyScheduler(ASHA, [LOSS, BYTES], 80, {})
    resumed = trial(tmp_path, 5)
    scheduler.on_trial_add(None, resumed)
    for number, loss in enumerate((0.1, 0.15)):
        decide(scheduler, trial(tmp_path, number), report(10, loss, 100))
    assert scheduler.on_trial_result(None, resumed, report(15, 0.9, 100)) == "CONTINUE"
    for number, loss in enumerate((0.1, 0.15)):
        scheduler.on_trial_result(None, trial(tmp_path, number), report(20, loss, 100))
    assert scheduler.on_trial_result(None, resumed, report(20, 0.9, 100)) == "STOP"


def test_rungs_stand_where_those_of_asha_do() -> None:
    places = {"time_attr": "steps", "max_t": 100, "grace_period": 6, "reduction_factor": 3}
    rungs = DominanceRungs([LOSS, BYTES], **places)
    asha = AsyncHyperBandScheduler(metric="eval/loss", mode="min", **places)
    assert [place for place, *_ in rungs._rungs] == [place for place, _ in asha._brackets[0]._rungs]


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_with_one_metric_the_rule_is_asha(factor: int) -> None:
    """Tune compares with a percentile of the others; where that is one of them, rules agree."""
    rng = random.Random(factor)
    places = {"time_attr": "steps", "max_t": 8, "grace_period": 8, "reduction_factor": factor}
    rungs = DominanceRungs([LOSS], **places)
    asha = AsyncHyperBandScheduler(metric="eval/loss", mode="min", stop_last_trials=False, **places)
    compared = set()
    for number in range(60):
        said, one = {"steps": 8, "eval/loss": rng.random()}, SimpleNamespace(trial_id=str(number))
        asha.on_trial_add(None, one)
        known, own = asha.on_trial_result(None, one, said), rungs.on_trial_result(None, one, said)
        if (number - 1) % factor == 0:
            assert known == own
            compared.add(known)
    assert compared == {"CONTINUE", "STOP"}
