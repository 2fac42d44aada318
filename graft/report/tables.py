"""The tables of a report, as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from typing import NamedTuple

from graft.artifacts.record import ParityReport
from graft.recipe.costs import unit_of
from graft.report.facts import FormFacts, StudyReport, TrialFacts
from graft.report.figures import drift_timeline, setting
from graft.report.svg import number
from graft.report.words import (
    bytes_words,
    duration_words,
    interval_words,
    metric_words,
    short_name,
)


class Cell(NamedTuple):
    """A table cell; `html` is trusted, made by this module."""

    html: str
    css: str = ""


_STATES = {
    "complete": "good",
    "running": "warn",
    "paused": "warn",
    "failed": "bad",
    "infeasible": "bad",
}


def trials_table(report: StudyReport) -> str:
    """Every trial, the chosen one first, then the best complete ones."""
    if not report.trials:
        return empty("No trial yet.")
    params = sorted({name for trial in report.trials for name in trial.params})
    metrics = _metric_columns(report)
    head = [
        Cell("trial"),
        Cell("state"),
        *(Cell(escape(short_name(p))) for p in params),
        *(Cell(escape(m), "num") for m in metrics),
        Cell("steps", "num"),
        Cell("time", "num"),
        Cell("adapter", "num"),
        Cell("executor"),
        Cell("why"),
    ]
    rows = []
    for trial in sorted(report.trials, key=lambda t: _order(t, report)):
        css = "best" if trial.number == report.winner else ""
        cells = [
            Cell(str(trial.number) + (" ★" if css else "")),
            Cell(pill(trial.state, _STATES.get(trial.state, ""))),
            *(Cell(escape(setting(trial.params[p])) if p in trial.params else "") for p in params),
            *(
                Cell(
                    metric_words(trial.metrics[m], unit_of(m)) if m in trial.metrics else "", "num"
                )
                for m in metrics
            ),
            Cell(str(trial.steps), "num"),
            Cell(duration_words(trial.seconds) if trial.seconds else "", "num"),
            Cell(bytes_words(trial.adapter_bytes) if trial.adapter_bytes else "", "num"),
            Cell(escape(trial.executor or "")),
            Cell(escape(trial.reason or ""), "wide" if trial.reason else ""),
        ]
        rows.append((css, cells))
    return _trials_key(report) + table(head, rows)


def _trials_key(report: StudyReport) -> str:
    words = [] if report.winner is None else ["★ chosen."]
    has_sizes = all(t.adapter_bytes for t in report.trials if t.state == "complete")
    if report.front and (has_sizes or len(report.objectives) > 1):
        searched = " and ".join(escape(o.metric) for o in report.objectives)
        beside = searched if len(report.objectives) > 1 else f"{searched} and in size"
        numbers = ", ".join(map(str, report.front))
        words.append(
            f"On the Pareto front, where no other complete trial is better in {beside}: {numbers}."
        )
    return note(" ".join(words)) if words else ""


def front_table(report: StudyReport) -> str:
    """The trials of the front of several metrics, best first: what there is to choose from."""
    front = [trial for trial in report.trials if trial.number in report.front]
    if len(report.objectives) == 1 or not front:
        return ""
    params = sorted({name for trial in front for name in trial.params})
    head = [
        Cell("on the front"),
        *(Cell(escape(o.metric), "num") for o in report.objectives),
        *(Cell(escape(short_name(p))) for p in params),
    ]
    rows = [
        (
            "best" if trial.number == report.winner else "",
            [
                Cell(f"trial {trial.number}" + (" ★" if trial.number == report.winner else "")),
                *(
                    Cell(metric_words(trial.metrics[o.metric], o.unit), "num")
                    for o in report.objectives
                ),
                *(Cell(escape(setting(trial.params.get(p, "")))) for p in params),
            ],
        )
        for trial in sorted(front, key=lambda t: _order(t, report)[2:])
    ]
    return table(head, rows)


def _metric_columns(report: StudyReport) -> list[str]:
    """The searched metrics first, then what else every trial measured."""
    searched = [o.metric for o in report.objectives]
    shown = ("eval/", "cost/", "method/", "objective/", "rollout/", "train/loss")
    others = {m for t in report.trials for m in t.metrics if m.startswith(shown)}
    return searched + sorted(others - set(searched))


def _order(trial: TrialFacts, report: StudyReport) -> tuple[bool, bool, float, int]:
    objective = report.objectives[0]
    value = trial.metrics.get(objective.metric)
    sign = 1 if objective.mode == "min" else -1
    return (
        trial.number != report.winner,
        trial.state != "complete",
        float("inf") if value is None else sign * value,
        trial.number,
    )


def data_table(report: StudyReport) -> str:
    """What was proved of the data."""
    if not report.data:
        return empty("The data has not been checked for this study; `graft check` does.")
    names = (
        "part",
        "source",
        "rows",
        "tokens",
        "supervised tokens",
        "longest row",
        "truncated",
        "duplicates",
    )
    head = [Cell(name, "num" if index > 1 else "") for index, name in enumerate(names)]
    rows = []
    for split in report.data:
        share = split.num_supervised_tokens / max(1, split.num_tokens)
        cells = [
            Cell(escape(split.name)),
            Cell(escape(split.source), "mono"),
            Cell(f"{split.num_rows:,}", "num"),
            Cell(f"{split.num_tokens:,}", "num"),
            Cell(f"{split.num_supervised_tokens:,} ({share:.0%})", "num"),
            Cell(f"{split.longest_row_tokens:,}", "num"),
            Cell(str(split.num_truncated), "num"),
            Cell(str(split.num_duplicates), "num"),
        ]
        rows.append(("", cells))
    return table(head, rows)


def forms_table(report: StudyReport) -> str:
    """Every published form of the adapter, with its parity figures and gate."""
    if not report.forms:
        return empty("Nothing has been published from this study yet.")
    metric = report.objectives[0].metric
    head = [
        Cell("form"),
        Cell("version"),
        Cell("aliases"),
        Cell("size", "num"),
        Cell(escape(metric), "num"),
        Cell("same tokens", "num"),
        Cell("mean KL, nats", "num"),
        Cell("gate"),
        Cell("made"),
    ]
    return table(head, [("", _form_cells(form, metric)) for form in report.forms])


def _form_cells(form: FormFacts, metric: str) -> list[Cell]:
    parity = form.parity[-1] if form.parity else None
    value = form.metrics.get(metric)
    return [
        Cell(escape(form.form)),
        Cell(f'<code title="{form.digest}">{form.digest[:12]}</code>'),
        Cell(" ".join(pill(alias, "good") for alias in form.aliases)),
        Cell(bytes_words(form.num_bytes), "num"),
        Cell(
            "" if value is None else f"{number(value.value)} {escape(interval_words(value))}", "num"
        ),
        Cell(
            _against(parity.token_agreement, f"≥ {parity.min_token_agreement:g}") if parity else "",
            "num",
        ),
        Cell(_against(parity.mean_kl, f"≤ {parity.mean_kl_limit:g}") if parity else "", "num"),
        _gate(parity),
        Cell(escape(form.created_at)),
    ]


def _against(value: float | None, limit: str) -> str:
    shown = "not a number" if value is None else f"{value:.4g}"
    return f'{shown} <span class="soft">({limit})</span>'


def _gate(parity: ParityReport | None) -> Cell:
    if parity is None:
        return Cell("")
    if parity.passed:
        return Cell(pill("passed", "good"))
    return Cell(f"{pill('refused', 'bad')} {escape('; '.join(parity.reasons))}", "wide")


def drift_table(report: StudyReport) -> str:
    """The drift timeline: chart and table."""
    if not report.drift:
        return empty(
            "No watch has run for this name yet; `graft watch` or `graft loop` starts one."
        )
    svg = drift_timeline(report)
    key = note(
        "Each point is one test of a window of served prompts against the training reference; "
        "above 1 the detector calls it drift. Diamonds are alarms."
    )
    chart = f'{key}<div class="card single">{svg}</div>' if svg else ""
    names = ("time, UTC", "prompts", "state", "what happened", "p-value", "evidence")
    head = [Cell(name, "num" if name in ("prompts", "p-value") else "") for name in names]
    rows = []
    for point in report.drift:
        css = {"PROMOTED": "good", "REJECTED": "bad", "DRIFT": "warn"}.get(point.state, "")
        cells = [
            Cell(datetime.fromtimestamp(point.time_s, UTC).strftime("%Y-%m-%d %H:%M:%S")),
            Cell(str(point.num_prompts), "num"),
            Cell(pill(point.state, css)),
            Cell(escape(point.label), "wide"),
            Cell("" if point.p_value is None else number(point.p_value), "num"),
            Cell(escape(_evidence(point.evidence)) if point.kind == "state" else "", "wide"),
        ]
        rows.append(("", cells))
    return chart + table(head, rows)


def _evidence(evidence: dict[str, object] | None) -> str:
    """The scalars of a decision's evidence, in words."""
    parts = []
    for name, value in (evidence or {}).items():
        if isinstance(value, float):
            parts.append(f"{name} {number(value)}")
        elif isinstance(value, str):
            parts.append(f"{name} {value[:12] if len(value) == 64 else value}")
        elif isinstance(value, int):
            parts.append(f"{name} {value}")
    return ", ".join(parts)


def table(head: Sequence[Cell], rows: Sequence[tuple[str, Sequence[Cell]]]) -> str:
    """A table that scrolls by itself; each row is its CSS class and its cells."""

    def row(cells: Sequence[Cell], tag: str, css: str = "") -> str:
        inner = "".join(f'<{tag} class="{c.css}">{c.html}</{tag}>' for c in cells)
        return f'<tr class="{css}">{inner}</tr>'

    body = "".join(row(cells, "td", css) for css, cells in rows)
    content = f"<table><thead>{row(head, 'th')}</thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll">{content}</div>'


def note(text: str) -> str:
    """A quiet line of explanation."""
    return f'<p class="soft small">{text}</p>'


def empty(text: str) -> str:
    """A dashed box that says what is missing."""
    return f'<div class="empty">{escape(text)}</div>'


def pill(text: str, css: str = "") -> str:
    """A word in a coloured shape."""
    return f'<span class="pill {css}">{escape(text)}</span>'
