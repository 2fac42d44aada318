"""The page: whole, self-contained, safe with hostile text, sensible when empty."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from graft.report import ObjectiveFacts, StudyReport, render
from graft.report.figures import staircase
from graft.report.svg import Line, Point, Scale, number, plot
from tests.unit.report.example import METRIC, example_report

VOID = {"meta", "br"}


class Balance(HTMLParser):
    """Complains about tags that are not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """A tag that closes itself."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def empty_report() -> StudyReport:
    """A study that has only begun."""
    cleared = {
        "trials": (),
        "forms": (),
        "drift": (),
        "data": (),
        "importances": (),
        "front": (),
        "winner": None,
        "winner_metrics": {},
        "chosen_recipe": None,
    }
    return example_report().model_copy(update=cleared)


@pytest.mark.parametrize("report", [example_report(), empty_report()], ids=["full", "empty"])
def test_the_page_is_well_formed_and_needs_nothing_from_outside(report: StudyReport) -> None:
    page = render(report)
    parser = Balance()
    parser.feed(page)
    assert not parser.open
    assert not re.search(r"(src|href)=\"(?!#)|@import|url\(|<script", page)
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(svg)


def test_every_part_is_on_the_page() -> None:
    page = render(example_report())
    for words in (
        "trial 7",
        "exact_match",
        "9.77 MB",
        "svd+int8",
        "smart-home@champion",
        "refused",
        "promoted",
        "p-value",
        "31,000 (32%)",
        "method: {type: lora, r: 32}",
        "0.0005",
    ):
        assert words in page
    assert page.count('role="img"') == 6


def test_an_empty_study_says_what_is_missing() -> None:
    page = render(empty_report())
    assert page.count('class="empty"') == 7
    assert "<svg" not in page


def test_text_from_outside_is_never_markup() -> None:
    report = example_report().model_copy(
        update={"recipe": "<script>alert(1)</script>", "base": "<img src=x onerror=alert(1)>"}
    )
    page = render(report)
    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;not finite&gt;" in page


def test_the_figures_survive_json() -> None:
    report = example_report()
    assert StudyReport.model_validate_json(report.model_dump_json()) == report
    assert report.winner_metrics[METRIC].rows == 240


@pytest.mark.parametrize(
    ("values", "is_log"),
    [([0.1, 7.3], False), ([1e-5, 1e-2], True), ([3.0, 3.0], False), ([], True)],
)
def test_ticks_are_inside_the_axis_and_few(values: list[float], is_log: bool) -> None:
    scale = Scale(values, 0, 100, log=is_log)
    ticks = scale.ticks()
    assert 2 <= len(ticks) <= 9
    assert all(scale.low <= tick <= scale.high for tick in ticks)
    assert 0 <= scale(ticks[0]) < scale(ticks[-1]) <= 100


def test_a_single_point_and_a_flat_curve_can_be_drawn() -> None:
    for points in ([Point(1, 1)], [Point(0, 0.0), Point(10, 0.0)]):
        svg = plot(x_label="x", y_label="y", title="t", lines=[Line(points, "best")])
        assert "nan" not in svg


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.0312, "0.0312"), (1e-5, "1e-05"), (12800, "12,800"), (-2.5, "-2.5")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


def test_searched_costs_are_drawn_and_listed_with_their_units() -> None:
    costs = {"cost/adapter_bytes": 1_250_000.0, "cost/latency_ms": 41.25}
    objectives = (
        ObjectiveFacts(metric=METRIC, mode="max"),
        ObjectiveFacts(metric="cost/adapter_bytes", mode="min", unit="bytes"),
        ObjectiveFacts(metric="cost/latency_ms", mode="min", unit="ms"),
    )
    shown = tuple(
        t.model_copy(update={"metrics": {**t.metrics, **costs}}) for t in example_report().trials
    )
    page = render(example_report().model_copy(update={"objectives": objectives, "trials": shown}))
    for words in ("1.25 MB", "41.2 ms", "cost/adapter_bytes, MB", "cost/latency_ms, ms"):
        assert words in page
    assert "adapter size, fp32" not in page  # the searched chart says it


def test_the_front_of_two_maximised_metrics_falls_to_the_right() -> None:
    points = [Point(1, 0.9), Point(3, 0.5), Point(2, 0.4)]
    steps = staircase(points, is_max=True, x_is_max=True)
    assert [(p.x, p.y) for p in steps] == [(3, 0.5), (1, 0.5), (1, 0.9), (1, 0.9)]
