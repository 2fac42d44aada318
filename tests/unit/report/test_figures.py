"""What a person can tell from the charts: the front, what became of trials, which way is better."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

import pytest

from graft.report import ObjectiveFacts, StudyReport, TrialFacts, front, render
from graft.report.figures import MAX_CURVES, learning_curves, trade_offs
from graft.report.words import bytes_scale
from tests.unit.report.example import example_report

LOSS = ObjectiveFacts(metric="eval/loss", mode="min")
BYTES = ObjectiveFacts(metric="cost/adapter_bytes", mode="min", unit="bytes")
MARK = re.compile(r'<(?:circle|path) class="mark (\w+) (\w+)"[^>]*><title>trial (\d+) ')


def trial(number: int, state: Any, loss: float | None, size: float = 1.0) -> TrialFacts:
    metrics = {} if loss is None else {"eval/loss": loss, "cost/adapter_bytes": size}
    return TrialFacts(number=number, state=state, params={"r": number}, metrics=metrics)


@pytest.fixture
def report() -> StudyReport:
    """The front is 0, 1 and 4, of which 1 is chosen."""
    trials = (
        trial(0, "complete", 0.9, 2e3),
        trial(1, "complete", 0.3, 9e4),
        trial(2, "complete", 0.9, 9e4),
        trial(3, "stopped", 1.2, 1e4),
        trial(4, "complete", 0.5, 1e4),
        trial(5, "failed", 2.0, 1e4),
        trial(6, "running", 1.5, 4e4),
        trial(7, "infeasible", None),
        trial(8, "failed", None),
    )
    objectives = (LOSS, BYTES)
    return example_report().model_copy(
        update={
            "objectives": objectives,
            "trials": trials,
            "front": front(trials, objectives),
            "winner": 1,
            "winner_metrics": {},
        }
    )


def test_each_kind_of_trial_has_a_mark_of_its_own(report: StudyReport) -> None:
    ((heading, svg),) = trade_offs(report)
    assert heading == "eval/loss and cost/adapter_bytes"
    marks = {int(number): (shape, css) for shape, css, number in MARK.findall(svg)}
    assert marks == {
        0: ("dot", "best"),
        1: ("diamond", "best"),
        2: ("dot", "done"),
        3: ("dot", "stopped"),
        4: ("dot", "best"),
        5: ("cross", "bad"),
        6: ("ring", "open"),
    }
    labels = re.findall(r'<text class="tick best[^>]*>(\d+)<', svg)
    assert sorted(labels) == ["0", "1", "4"]
    for words in ("cost/adapter_bytes, kB (lower is better)", "eval/loss (lower is better)"):
        assert words in svg


def test_the_page_says_what_marks_mean_and_what_is_not_drawn(report: StudyReport) -> None:
    page = unescape(render(report))
    section = page[
        page.index('<section id="trade-offs">') : page.index('<section id="importances"')
    ]
    assert "<h2>Pareto front</h2>" in section
    for words in ("chosen", "on the front", "complete", "stopped early", "not finished", "failed"):
        assert f"</svg>{words}" in section
    assert "Not drawn, for want of a report: 1 failed, 1 infeasible." in section
    rows = re.findall(r"<td class=\"\">trial (\d+)( ★)?</td>", section)
    assert rows == [("1", " ★"), ("4", ""), ("0", "")]  # best first


def test_a_page_without_such_trials_has_no_mark_for_them() -> None:
    page = render(example_report())
    section = page[
        page.index('<section id="trade-offs">') : page.index('<section id="importances"')
    ]
    assert "not finished" not in section
    assert "on the front" in section  # of quality and size


def test_of_many_trials_the_best_are_drawn() -> None:
    report = example_report()
    many = tuple(
        report.trials[0].model_copy(
            update={"number": number, "metrics": {"eval/exact_match": number / 100}}
        )
        for number in range(100)
    )
    large = report.model_copy(update={"trials": many, "winner": 12})
    svg = learning_curves(large)[0][1]
    drawn = set(map(int, re.findall(r"<title>trial (\d+) ", svg)))
    assert drawn == {12, *range(100 - MAX_CURVES + 1, 100)}
    assert f"The best {MAX_CURVES} of 100 trials are drawn." in render(large)


@pytest.mark.parametrize(
    ("sizes", "unit"),
    [([900.0], "bytes"), ([2e3, 9e4], "kB"), ([1e3, 2e6], "MB"), ([7e9], "GB"), ([], "bytes")],
)
def test_sizes_are_drawn_in_the_unit_of_the_largest(sizes: list[float], unit: str) -> None:
    assert bytes_scale(sizes)[1] == unit
