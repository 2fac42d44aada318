from __future__ import annotations

from typing import Any

from graft.runtime.trial_table import MAX_ROWS, choose_rows, table_of
from graft.runtime.trials import TrialRecord

POINT = {"method": "lora", "method[lora]/r": 4, "train/lr": 1e-3}


def record(number: int, state: Any, **fields: Any) -> TrialRecord:
    return TrialRecord(number=number, state=state, executor="packed", params=POINT, **fields)


def test_the_table_keeps_the_unfinished_the_best_and_the_latest() -> None:
    trials = [record(0, "complete", metrics={"eval/loss": 0.25, "train/tokens_per_s": 1234.5})]
    trials += [record(1, "paused")]
    trials += [record(number, "stopped") for number in range(2, 40)]
    trials += [
        record(40, "running"),
        record(41, "infeasible").model_copy(update={"executor": None}),
    ]
    first = [trials[0], trials[1], trials[40]]
    shown = choose_rows(first, reversed(trials))
    headings, rows, marked = table_of(shown, ["eval/loss"], 0)
    assert headings == ["trial", "state", "steps", "method", "r", "lr", "eval/loss", "tokens/s"]
    assert len(rows) == MAX_ROWS
    assert marked == 0
    assert rows[0] == ["*0", "complete", "0", "lora", "4", "0.001", "0.25", "1234"]
    assert [row[0] for row in rows[1:]] == ["1", *(str(n) for n in (*range(23, 40), 40))]


def test_no_trial_that_runs_is_left_out() -> None:
    running = [record(number, "running") for number in range(MAX_ROWS + 3)]
    assert choose_rows(running, reversed([*running, record(99, "stopped")])) == running
