"""The charts of a report."""

from __future__ import annotations

from collections.abc import Sequence

from graft.recipe.costs import ADAPTER_BYTES
from graft.report.facts import DriftPoint, StudyReport, TrialFacts
from graft.report.svg import Line, Marks, Point, Rule, bars, number, plot


def trial_words(trial: TrialFacts) -> str:
    """A trial in one line: its number, state and settings."""
    settings = ", ".join(f"{name}={setting(value)}" for name, value in trial.params.items())
    return f"trial {trial.number} ({trial.state}): {settings}"


def setting(value: object) -> str:
    """A parameter's value as a person writes it."""
    return number(value) if isinstance(value, float) else str(value)


def _css(trial: TrialFacts, report: StudyReport) -> str:
    if trial.number == report.winner:
        return "best"
    return "done" if trial.state == "complete" else "stopped"


def learning_curves(report: StudyReport) -> list[tuple[str, str]]:
    """Returns (heading, SVG) of the searched metric and of the training loss, by step."""
    searched = report.objectives[0].metric
    ordered = sorted(
        report.trials, key=lambda t: (t.number == report.winner, t.state == "complete")
    )
    charts = []
    for heading, label, field in (
        (f"{searched} on held-out rows", searched, "searched"),
        ("Training loss", "training loss, nats a token", "train_loss"),
    ):
        lines = [
            Line(
                [
                    Point(
                        p.steps, p.value, f"{trial_words(trial)}; step {p.steps}: {number(p.value)}"
                    )
                    for p in getattr(trial, field)
                ],
                _css(trial, report),
                f"trial {trial.number}" if trial.number == report.winner else "",
            )
            for trial in ordered
            if getattr(trial, field)
        ]
        if lines:
            svg = plot(
                x_label="optimizer step",
                y_label=label,
                title=heading,
                lines=lines,
                y_log=field == "train_loss",
            )
            charts.append((heading, svg))
    return charts


def trade_offs(report: StudyReport) -> list[tuple[str, str]]:
    """Returns (heading, SVG) of quality against adapter size and against training time."""
    objective = report.objectives[0]
    shown = [
        t
        for t in report.trials
        if objective.metric in t.metrics and t.state not in ("failed", "infeasible")
    ]
    charts = []
    is_searched = any(other.metric == ADAPTER_BYTES for other in report.objectives[1:])
    if shown and not is_searched and all(trial.adapter_bytes for trial in shown):
        charts.append(
            (
                "Quality and adapter size",
                _scatter(
                    report,
                    shown,
                    "adapter size, MB (fp32)",
                    [(t.adapter_bytes or 0) / 1e6 for t in shown],
                ),
            )
        )
    if shown and any(trial.seconds for trial in shown):
        charts.append(
            (
                "Quality and training time",
                _scatter(report, shown, "training time, s", [t.seconds for t in shown]),
            )
        )
    searched = []
    for other in report.objectives[1:]:
        both = [t for t in shown if other.metric in t.metrics]
        if both:
            scale, unit = (1e6, "MB") if other.unit == "bytes" else (1.0, other.unit)
            svg = _scatter(
                report,
                both,
                f"{other.metric}, {unit}".removesuffix(", "),
                [t.metrics[other.metric] / scale for t in both],
                x_is_max=other.mode == "max",
            )
            searched.append((f"{objective.metric} and {other.metric}", svg))
    return searched + charts


def _scatter(
    report: StudyReport,
    trials: Sequence[TrialFacts],
    x_label: str,
    x_values: Sequence[float],
    *,
    x_is_max: bool = False,
) -> str:
    objective = report.objectives[0]
    points: dict[str, list[Point]] = {"stopped": [], "done": [], "best": []}
    for trial, x in zip(trials, x_values, strict=True):
        y = trial.metrics[objective.metric]
        tip = f"{trial_words(trial)}; {objective.metric} {number(y)}, {x_label} {number(x)}"
        points[_css(trial, report)].append(Point(x, y, tip))
    finished = [*points["done"], *points["best"]]
    return plot(
        x_label=x_label,
        y_label=objective.metric,
        title=f"{objective.metric} against {x_label}",
        lines=[
            Line(staircase(finished, is_max=objective.mode == "max", x_is_max=x_is_max), "front")
        ],
        marks=[
            Marks(points["stopped"], "stopped"),
            Marks(points["done"], "done"),
            Marks(points["best"], "best", "diamond"),
        ],
    )


def staircase(points: Sequence[Point], *, is_max: bool, x_is_max: bool = False) -> list[Point]:
    """The front of the points: the best value that so much x buys, as steps.

    Args:
        points: In any order.
        is_max: More of y is better.
        x_is_max: More of x is better too, not less.
    """
    best: float | None = None
    steps: list[Point] = []
    along = -1 if x_is_max else 1
    for point in sorted(points, key=lambda p: (along * p.x, -p.y if is_max else p.y)):
        if best is None or (point.y > best if is_max else point.y < best):
            if best is not None:
                steps.append(Point(point.x, best))
            steps.append(Point(point.x, point.y))
            best = point.y
    if steps and best is not None:
        last = max(points, key=lambda p: along * p.x)
        steps.append(Point(last.x, best))
    return steps


def importance_bars(report: StudyReport) -> str | None:
    """Returns the bars, or None where too few trials tell."""
    if not report.importances:
        return None
    rows = [
        (item.param, item.share, f"{item.share:.2f}  (p {item.p_value:.2g})")
        for item in report.importances
    ]
    return bars(rows, title="Parameter importances", x_label="share of the trials' order explained")


def drift_timeline(report: StudyReport) -> str | None:
    """Returns statistics over their thresholds by prompts, alarms and decisions marked."""
    tests = [p for p in report.drift if p.kind == "test" and p.threshold]
    if not tests:
        return None
    detectors = sorted({point.detector or "" for point in tests})
    lines = [
        Line([Point(p.num_prompts, _excess(p)) for p in tests if p.detector == name], "drift")
        for name in detectors
    ]
    calm = [_test_point(p) for p in tests if not p.is_alarm]
    alarms = [_test_point(p) for p in tests if p.is_alarm]
    changes = [p for p in report.drift if p.kind == "state" and p.state in ("PROMOTED", "REJECTED")]
    rules = [Rule(1.0, "y", "limit", "threshold")] + [
        Rule(p.num_prompts, "x", "good" if p.state == "PROMOTED" else "bad", p.state.lower())
        for p in changes
    ]
    return plot(
        x_label="served prompts",
        y_label="statistic ÷ threshold",
        title="Drift timeline",
        lines=lines,
        marks=[Marks(calm, "done"), Marks(alarms, "bad", "diamond")],
        rules=rules,
        height=300,
    )


def _excess(point: DriftPoint) -> float:
    return (point.statistic or 0.0) / (point.threshold or 1.0)


def _test_point(point: DriftPoint) -> Point:
    p_value = "" if point.p_value is None else f", p = {number(point.p_value)}"
    tip = f"{point.num_prompts} prompts: {point.label}{p_value}"
    return Point(point.num_prompts, _excess(point), tip)
