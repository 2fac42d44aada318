"""The finalists on the page and on the terminal."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from graft.cli.verbs.tune import show
from graft.pipelines.tune import TuneResult
from graft.report import render
from graft.report.finals_facts import FinalistFacts, Finals, RerunFacts
from graft.runtime.budget import Spending
from graft.runtime.trials import TrialRecord
from tests.unit.report.example import METRIC, example_report
from tests.unit.report.test_page import Balance


def rerun(seed: int, value: float | None, reason: str | None = None) -> RerunFacts:
    return RerunFacts(
        seed=seed, state="failed" if value is None else "complete", value=value, reason=reason
    )


@pytest.fixture
def finals() -> Finals:
    """Trial 7, and trial 0, which broke once."""
    return Finals(
        metric=METRIC,
        mode="max",
        seeds=(1, 2),
        confidence=0.9,
        finalists=(
            FinalistFacts(
                number=7,
                params={"method[lora]/r": 32, "train.lr": 1.2e-3},
                searched=0.971,
                reruns=(rerun(1, 0.93), rerun(2, 0.95)),
                mean=0.94,
                low=0.877,
                high=1.003,
            ),
            FinalistFacts(
                number=0,
                params={"method[lora]/r": 8, "train.lr": 1e-3},
                searched=0.96,
                reruns=(rerun(1, 0.92), rerun(2, None, "loss <nan>")),
                mean=0.92,
            ),
        ),
        published_seed=2,
        verdict="trial 7 <leads>",
    )


def test_the_page_shows_mean_interval_and_every_seed(finals: Finals) -> None:
    page = render(example_report().model_copy(update={"finals": finals}))
    parser = Balance()
    parser.feed(page)
    assert not parser.open
    section = page.partition('<section id="finalists">')[2].partition("</section>")[0]
    for words in (
        "trial 7 &lt;leads&gt;",
        "90% interval",
        f"mean {METRIC}",
        "[0.877, 1]",
        "0.95 ★",
        "0.971",
        "failed",
        "seed 2: loss &lt;nan&gt;",
    ):
        assert words in section
    assert section.count("★") == 2  # the run, and what the star means


def test_a_page_without_finalists_has_no_such_section() -> None:
    assert 'id="finalists"' not in render(example_report())


def test_the_terminal_shows_the_same_and_the_verdict(finals: Finals) -> None:
    trial: dict[str, Any] = {"state": "complete", "params": {}, "metrics": {METRIC: 0.9}}
    trials = tuple(TrialRecord(number=number, **trial) for number in (0, 7))
    result = TuneResult(
        study="smart-home",
        folder="studies/smart-home",
        trials=trials,
        searched=(METRIC,),
        best=trials[1],
        finals=finals,
        front=(7,),
        artifact="a" * 64,
        metrics={},
        num_infeasible=0,
        num_run=2,
        spending=Spending(
            trials=2, num_ended=2, max_hours=None, hours=0.25, max_tokens=None, tokens=900
        ),
        ended_by="search.trials",
        seconds=1.0,
    )
    text = io.StringIO()
    show(result, Console(file=text, width=120, markup=False, highlight=False))
    shown = text.getvalue()
    for words in ("*7", "0.94", "[0.877, 1]", "0.95 ★", "failed"):
        assert words in shown
    assert "trial 7 <leads>; published: seed 2" in shown
    assert TuneResult.model_validate_json(result.model_dump_json()) == result
