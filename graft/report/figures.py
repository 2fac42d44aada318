"""The charts of a report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from graft.recipe.costs import ADAPTER_BYTES, is_known_early
from graft.report.facts import DriftPoint, ObjectiveFacts, StudyReport, TrialFacts
from graft.report.svg import Line, Marks, Point, Rule, Shape, bars, legend, number, plot
from graft.report.words import bytes_scale, metric_words

MAX_CURVES = 60
"""Trials whose curves are drawn: more of them hide each other."""
_MAX_LABELS = 25

Kind = Literal["failed", "stopped", "open", "complete", "front", "chosen"]

_MARKS: dict[Kind, tuple[Shape, str, str]] = {
    "chosen": ("diamond", "best", "chosen"),
    "front": ("dot", "best", "on the front, with its number"),
    "complete": ("dot", "done", "complete"),
    "stopped": ("dot", "stopped", "stopped early"),
    "open": ("ring", "open", "not finished"),
    "failed": ("cross", "bad", "failed, at its last report"),
}
"""Shape, class and words of each kind; the first ones are drawn last."""


def _kind(trial: TrialFacts, report: StudyReport, front: Iterable[int] = ()) -> Kind:
    if trial.number == report.winner:
        return "chosen"
    if trial.number in front:
        return "front"
    if trial.state == "complete":
        return "complete"
    if trial.state in ("failed", "infeasible"):
        return "failed"
    return "stopped" if trial.state == "stopped" else "open"


def trial_words(trial: TrialFacts) -> str:
    """A trial in one line: its number, state and settings."""
    settings = ", ".join(f"{name}={setting(value)}" for name, value in trial.params.items())
    return f"trial {trial.number} ({trial.state}): {settings}"


def setting(value: object) -> str:
    """A parameter's value as a person writes it."""
    return number(value) if isinstance(value, float) else str(value)


def axis_words(objective: ObjectiveFacts, unit: str) -> str:
    """An axis of a searched metric: `cost/latency_ms, ms (lower is better)`."""
    better = "lower" if objective.mode == "min" else "higher"
    return f"{objective.metric}{', ' if unit else ''}{unit} ({better} is better)"


def curves_drawn(report: StudyReport) -> list[TrialFacts]:
    """The trials whose curves are drawn: the chosen one, then the best, `MAX_CURVES` at most."""
    objective = report.objectives[0]
    sign = 1 if objective.mode == "min" else -1

    def place(trial: TrialFacts) -> tuple[bool, bool, float]:
        value = trial.metrics.get(objective.metric, float("inf") * sign)
        return trial.number != report.winner, trial.state != "complete", sign * value

    return sorted(report.trials, key=place)[:MAX_CURVES]


def curves_key(report: StudyReport) -> str:
    """What the colours of the curves stand for."""
    return _key(_kind(trial, report) for trial in curves_drawn(report))


def learning_curves(report: StudyReport) -> list[tuple[str, str]]:
    """Returns (heading, SVG) of the searched metric and of the training loss, by step."""
    objective = report.objectives[0]
    charts = []
    for heading, label, field in (
        (f"{objective.metric} on held-out rows", axis_words(objective, ""), "searched"),
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
                _MARKS[_kind(trial, report)][1],
                f"trial {trial.number}" if trial.number == report.winner else "",
            )
            for trial in reversed(curves_drawn(report))
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


def trade_offs_key(report: StudyReport) -> str:
    """What the marks stand for."""
    front = report.front if len(report.objectives) > 1 or _sizes(report) else ()
    return _key(_kind(trial, report, front) for trial in _with_value(report))


def trade_offs(report: StudyReport) -> list[tuple[str, str]]:
    """Returns (heading, SVG) of quality against each other searched metric, size and time."""
    objective, shown = report.objectives[0], _with_value(report)
    charts = []
    for other in report.objectives[1:]:
        values = {t.number: t.metrics[other.metric] for t in shown if other.metric in t.metrics}
        if values:
            heading = f"{objective.metric} and {other.metric}"
            charts.append((heading, _scatter(report, other, values, report.front)))
    is_searched = any(other.metric == ADAPTER_BYTES for other in report.objectives[1:])
    if not is_searched and (sizes := _sizes(report)):
        size = ObjectiveFacts(metric="adapter size, fp32", mode="min", unit="bytes")
        front = report.front if len(report.objectives) == 1 else ()
        charts.append(("Quality and adapter size", _scatter(report, size, sizes, front)))
    seconds = {trial.number: trial.seconds for trial in shown}
    if any(seconds.values()):
        time = ObjectiveFacts(metric="training time", mode="min", unit="s")
        charts.append(("Quality and training time", _scatter(report, time, seconds, ())))
    return charts


def _with_value(report: StudyReport) -> list[TrialFacts]:
    return [t for t in report.trials if report.objectives[0].metric in t.metrics]


def _sizes(report: StudyReport) -> dict[int, float]:
    """Adapter bytes by trial, where they are known of all that have a value."""
    shown = _with_value(report)
    sizes = {t.number: float(t.adapter_bytes) for t in shown if t.adapter_bytes}
    return sizes if len(sizes) == len(shown) else {}


def undrawn_words(report: StudyReport) -> str:
    """Says which trials are in no chart, or not in each, and why; empty where all are drawn."""
    told = [
        f"{o.metric} is measured at the end, so trials that did not come to it have none."
        for o in report.objectives[1:]
        if not is_known_early(o.metric)
    ]
    drawn = {trial.number for trial in _with_value(report)}
    states = [trial.state for trial in report.trials if trial.number not in drawn]
    counts = {state: states.count(state) for state in dict.fromkeys(sorted(states))}
    if counts:
        words = ", ".join(f"{count} {state}" for state, count in counts.items())
        told.append(f"Not drawn, for want of a report: {words}.")
    return " ".join(told)


def _scatter(
    report: StudyReport, other: ObjectiveFacts, values: dict[int, float], front: Sequence[int]
) -> str:
    """Draws the first searched metric against another one.

    Args:
        report: Of the study.
        other: Along x.
        values: Trial → its value of that.
        front: Trials that are marked, and labelled with their numbers where there is room.
    """
    objective = report.objectives[0]
    scale, unit = bytes_scale(values.values()) if other.unit == "bytes" else (1.0, other.unit)
    points: dict[Kind, list[Point]] = {kind: [] for kind in reversed(_MARKS)}
    complete = []
    for trial in report.trials:
        if trial.number not in values:
            continue
        value, kind = trial.metrics[objective.metric], _kind(trial, report, front)
        told = metric_words(values[trial.number], other.unit)
        tip = f"{trial_words(trial)}; {objective.metric} {number(value)}, {other.metric} {told}"
        is_named = trial.number in front and len(front) <= _MAX_LABELS
        label = str(trial.number) if is_named else ""
        points[kind].append(Point(values[trial.number] / scale, value, tip, label))
        if trial.state == "complete":
            complete.append(points[kind][-1])
    is_max, x_is_max = objective.mode == "max", other.mode == "max"
    return plot(
        x_label=axis_words(other, unit),
        y_label=axis_words(objective, ""),
        title=f"{objective.metric} against {other.metric}",
        lines=[Line(staircase(complete, is_max=is_max, x_is_max=x_is_max), "front")],
        marks=[Marks(found, _MARKS[kind][1], _MARKS[kind][0]) for kind, found in points.items()],
        x_log=other.unit == "bytes",
    )


def _key(kinds: Iterable[Kind]) -> str:
    """The legend of the kinds that there are."""
    found = set(kinds)
    return legend([mark for kind, mark in _MARKS.items() if kind in found])


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
