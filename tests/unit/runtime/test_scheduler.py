"""Rungs are rebuilt from reports: a new driver stops the trials that the old one would have."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from graft.core.events import EventLog
from graft.engine.run_folder import REPORTS_FILE
from graft.recipe.search import AshaScheduler, SearchObjective
from graft.runtime.scheduler import StudyScheduler

LOSS = SearchObjective(metric="eval/loss", mode="min")
MATCH = SearchObjective(metric="eval/exact_match", mode="max")
ASHA = AshaScheduler(grace_steps=10)


def report(steps: int, loss: float, match: float = 0.0, tokens: int = 0) -> dict[str, Any]:
    return {"steps": steps, "tokens": tokens, "eval/loss": loss, "eval/exact_match": match}


def trial(folder: Path, number: int, origin: int | None = None) -> Any:
    first = number if origin is None else origin
    config = {"folder": str(folder / str(number)), "origin": str(folder / str(first))}
    return SimpleNamespace(trial_id=f"t{number}", config=config)


def decide(scheduler: StudyScheduler, trial: Any, *reports: dict[str, Any]) -> str:
    scheduler.on_trial_add(None, trial)
    return [scheduler.on_trial_result(None, trial, said) for said in reports][-1]


def test_the_worse_half_is_stopped_at_a_rung(tmp_path: Path) -> None:
    scheduler = StudyScheduler(ASHA, [LOSS], 40, {})
    assert decide(scheduler, trial(tmp_path, 0), report(10, 0.5)) == "CONTINUE"
    assert decide(scheduler, trial(tmp_path, 1), report(10, 0.9)) == "STOP"
    assert decide(scheduler, trial(tmp_path, 2), report(10, 0.2)) == "CONTINUE"


def test_ended_trials_of_an_earlier_driver_count(tmp_path: Path) -> None:
    for number, loss in enumerate((0.1, 0.2)):
        EventLog(tmp_path / str(number) / REPORTS_FILE).append("report", **report(10, loss))
    ended = {tmp_path / name: (tmp_path / name, 40) for name in "01"}
    scheduler = StudyScheduler(ASHA, [LOSS], 40, ended)
    assert decide(scheduler, trial(tmp_path, 2), report(10, 0.5)) == "STOP"
    assert decide(StudyScheduler(ASHA, [LOSS], 40, {}), trial(tmp_path, 2), report(10, 0.5)) == (
        "CONTINUE"
    )


def test_a_resumed_trial_is_not_judged_twice_at_a_rung(tmp_path: Path) -> None:
    EventLog(tmp_path / "5" / REPORTS_FILE).append("report", **report(10, 0.3))
    scheduler = StudyScheduler(ASHA, [LOSS], 80, {})
    resumed = trial(tmp_path, 5)
    scheduler.on_trial_add(None, resumed)
    for number, loss in enumerate((0.1, 0.15)):
        decide(scheduler, trial(tmp_path, number), report(10, loss))
    assert scheduler.on_trial_result(None, resumed, report(15, 0.3)) == "CONTINUE"


def test_what_workers_did_past_the_end_of_their_trial_fills_no_rung(tmp_path: Path) -> None:
    for steps, loss in ((10, 0.9), (20, 0.1)):  # it was stopped after the first of them
        EventLog(tmp_path / "0" / REPORTS_FILE).append("report", **report(steps, loss))
    for last, decided in ((10, "CONTINUE"), (20, "STOP")):
        scheduler = StudyScheduler(ASHA, [LOSS], 80, {tmp_path / "0": (tmp_path / "0", last)})
        assert decide(scheduler, trial(tmp_path, 1), report(10, 0.8)) == "CONTINUE"
        assert scheduler.on_trial_result(None, trial(tmp_path, 1), report(20, 0.5)) == decided


def test_a_trial_that_goes_on_under_another_number_is_one_of_a_rung(tmp_path: Path) -> None:
    for more, decided in (([], "CONTINUE"), ([0.5], "CONTINUE")):
        scheduler = StudyScheduler(ASHA, [LOSS], 80, {})
        for number, loss in enumerate((0.5, 0.7)):
            decide(scheduler, trial(tmp_path, number), report(10, loss))
        for loss in more:  # trial 0 was stopped, and taken up again
            EventLog(tmp_path / "8" / REPORTS_FILE).append("report", **report(10, loss))
            scheduler.on_trial_add(None, trial(tmp_path, 8, origin=0))
        assert decide(scheduler, trial(tmp_path, 9), report(10, 0.55)) == decided


def test_with_several_metrics_a_trial_goes_on_while_one_of_them_is_good(tmp_path: Path) -> None:
    scheduler = StudyScheduler(ASHA, [LOSS, MATCH], 40, {})
    assert decide(scheduler, trial(tmp_path, 0), report(10, 0.5, 0.5)) == "CONTINUE"
    assert decide(scheduler, trial(tmp_path, 1), report(10, 0.9, 0.9)) == "CONTINUE"
    assert decide(scheduler, trial(tmp_path, 2), report(10, 0.95, 0.1)) == "STOP"


def test_rungs_in_tokens_compare_trials_of_other_batch_sizes_at_equal_tokens(
    tmp_path: Path,
) -> None:
    """Trials of 100 and of 25 tokens a step: the small one is as far after four times the steps."""
    large, small, worse = (trial(tmp_path, number) for number in range(3))
    in_steps = StudyScheduler(ASHA, [LOSS], 40, {})
    assert decide(in_steps, large, report(10, 0.5, tokens=1000)) == "CONTINUE"
    assert decide(in_steps, small, report(10, 0.9, tokens=250)) == "STOP"

    in_tokens = StudyScheduler(AshaScheduler(grace_tokens=1000), [LOSS], 4000, {})
    assert decide(in_tokens, large, report(10, 0.5, tokens=1000)) == "CONTINUE"
    assert decide(in_tokens, small, report(10, 0.9, tokens=250)) == "CONTINUE"
    assert in_tokens.on_trial_result(None, small, report(40, 0.4, tokens=1000)) == "CONTINUE"
    assert decide(in_tokens, worse, report(39, 0.6, tokens=990)) == "CONTINUE"
    assert in_tokens.on_trial_result(None, worse, report(41, 0.6, tokens=1040)) == "STOP"
    assert in_tokens.on_trial_result(None, large, report(20, 0.3, tokens=2000)) == "CONTINUE"
    assert in_tokens.on_trial_result(None, small, report(79, 0.8, tokens=1975)) == "CONTINUE"
    assert in_tokens.on_trial_result(None, small, report(80, 0.8, tokens=2000)) == "STOP"


def test_the_first_rung_in_tokens_may_be_a_quarter_of_the_longest_trial(tmp_path: Path) -> None:
    scheduler = StudyScheduler(AshaScheduler(grace_tokens="auto"), [LOSS], 4000, {})
    assert decide(scheduler, trial(tmp_path, 0), report(1, 0.1, tokens=1000)) == "CONTINUE"
    assert decide(scheduler, trial(tmp_path, 1), report(9, 0.9, tokens=999)) == "CONTINUE"
    assert decide(scheduler, trial(tmp_path, 2), report(1, 0.9, tokens=1000)) == "STOP"


def test_rungs_in_tokens_are_rebuilt_from_reports_too(tmp_path: Path) -> None:
    section = AshaScheduler(grace_tokens=1000)
    EventLog(tmp_path / "0" / REPORTS_FILE).append("report", **report(40, 0.1, tokens=1000))
    EventLog(tmp_path / "1" / REPORTS_FILE).append("report", **report(10, 0.01, tokens=250))
    ended = {tmp_path / name: (tmp_path / name, 40) for name in "01"}
    scheduler = StudyScheduler(section, [LOSS], 4000, ended)
    assert decide(scheduler, trial(tmp_path, 2), report(10, 0.05, tokens=1000)) == "CONTINUE"
    assert decide(scheduler, trial(tmp_path, 3), report(10, 0.2, tokens=1000)) == "STOP"
