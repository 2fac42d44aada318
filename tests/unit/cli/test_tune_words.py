"""What `graft tune` prints of a search that a budget has ended, and of one to come."""

from __future__ import annotations

import io

from rich.console import Console

from graft.cli.verbs.tune import show
from graft.pipelines.tune import TunePlan, TuneResult
from graft.runtime.budget import Spending
from graft.runtime.trials import TrialRecord

SPENT = Spending(trials=4, num_ended=1, max_hours=None, hours=0.25, max_tokens=1000, tokens=1010)


def printed(record: TuneResult | TunePlan) -> str:
    console = Console(file=io.StringIO(), width=200)
    show(record, console)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_a_search_tells_which_budget_ended_it_and_what_goes_on_with_more() -> None:
    best = TrialRecord(number=0, state="complete", params={}, steps=8, tokens=700)
    paused = TrialRecord(number=1, state="paused", params={}, steps=4, tokens=310)
    result = TuneResult(
        study="tiny",
        folder="/home/studies/tiny",
        trials=(best, paused),
        searched=("eval/loss",),
        best=best,
        finals=None,
        front=(0,),
        artifact="d" * 64,
        metrics={},
        num_infeasible=0,
        num_run=1,
        spending=SPENT,
        ended_by="search.max_tokens",
        seconds=1.0,
    )
    words = printed(result)
    assert (
        "ended by search.max_tokens: 1 of 4 trials, 0.25 hours, 1,010 of 1,000 tokens; paused "
        "trials: 1, --set search.max_tokens=N goes on"
    ) in words
    assert "310" in words


def test_a_dry_run_tells_what_is_left_of_every_budget() -> None:
    plan = TunePlan(
        study="tiny", folder="/home/studies/tiny", holes={}, spending=SPENT, num_reruns=0
    )
    words = printed(plan)
    assert "spent: 1 of 4 trials, 0.25 hours, 1,010 of 1,000 tokens" in words
    assert "left: 3 trials, 0 tokens" in words
