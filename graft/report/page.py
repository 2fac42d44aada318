"""One HTML page from the facts: no script, no font, no address outside the file."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import NamedTuple

from graft.report.facts import FormFacts, StudyReport
from graft.report.figures import (
    curves_drawn,
    curves_key,
    importance_bars,
    learning_curves,
    setting,
    trade_offs,
    trade_offs_key,
    undrawn_words,
)
from graft.report.finals import finals_table
from graft.report.importance import MIN_TRIALS
from graft.report.svg import number
from graft.report.tables import (
    data_table,
    drift_table,
    empty,
    forms_table,
    front_table,
    note,
    trials_table,
)
from graft.report.words import bytes_words, duration_words, interval_words, short_name


class Section(NamedTuple):
    """A part of the page."""

    anchor: str
    heading: str
    body: str


def render(report: StudyReport) -> str:
    """Returns the whole page."""
    sections = [
        Section("search", "Search", _search(report)),
        Section("trade-offs", _trade_offs_heading(report), _trade_offs(report)),
        Section("importances", "What mattered", _importances(report)),
        Section("trials", "Trials", trials_table(report)),
        *_finals(report),
        Section("recipe", "Recipe", _recipes(report)),
        Section("data", "Data", data_table(report)),
        Section("forms", "Adapters and parity", forms_table(report)),
        Section("drift", "Drift and renewal", drift_table(report)),
    ]
    name = escape(report.name)
    return document(name, _subtitle(report), sections, _tiles(report), _footer(report))


def document(name: str, subtitle: str, sections: Sequence[Section], tiles: str, footer: str) -> str:
    """Puts a whole page together; all text in it is HTML already.

    Args:
        name: The heading, and the start of the title.
        subtitle: Below it.
        sections: In order; each gets a link at the top.
        tiles: The few figures to see first.
        footer: At the end.
    """
    style = (files("graft.report") / "style.css").read_text(encoding="utf-8")
    links = "".join(f'<a href="#{s.anchor}">{escape(s.heading)}</a>' for s in sections)
    body = "".join(
        f'<section id="{s.anchor}"><h2>{escape(s.heading)}</h2>{s.body}</section>' for s in sections
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name} | GRAFT report</title><style>{style}</style></head><body><main>"
        f'<header><h1>{name}</h1><p class="soft">{subtitle}</p></header>'
        f"<nav>{links}</nav>{tiles}{body}{footer}</main></body></html>\n"
    )


def _subtitle(report: StudyReport) -> str:
    goals = " and ".join(
        f"{'lowest' if o.mode == 'min' else 'highest'} {o.metric}" for o in report.objectives
    )
    return f"{escape(goals)} on {escape(report.base)} · {escape(report.created_at)}"


def _tiles(report: StudyReport) -> str:
    tiles: list[tuple[str, str, str]] = []
    metric = report.objectives[0].metric
    value = report.winner_metrics.get(metric)
    if value is not None:
        note = interval_words(value)
        if metric in report.base_metrics:
            note += f"; the bare base: {number(report.base_metrics[metric].value)}"
        tiles.append((metric, number(value.value), note))
    counts = {state: sum(t.state == state for t in report.trials) for state in _KNOWN_STATES}
    told = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    tiles.append(("trials", str(len(report.trials)), told or "none yet"))
    if report.winner is not None:
        best = next(t for t in report.trials if t.number == report.winner)
        words = ", ".join(f"{short_name(k)} {setting(v)}" for k, v in best.params.items())
        tiles.append(("chosen", f"trial {best.number}", words))
    if (served := _served(report)) is not None:
        whole = next((f for f in report.forms if f.digest == served.parent), served)
        note = "as trained" if served.form == "trained" else served.form
        if served.num_bytes < whole.num_bytes:
            note += f", 1/{whole.num_bytes / served.num_bytes:.1f} of what was trained"
        tiles.append(("adapter", bytes_words(served.num_bytes), note))
    seconds = sum(trial.seconds for trial in report.trials)
    if seconds:
        tiles.append(("training time", duration_words(seconds), "summed over trials"))
    return tile_row(tiles)


def _served(report: StudyReport) -> FormFacts | None:
    """The champion, or else the newest form that its parity let through."""
    let_through = [f for f in report.forms if all(parity.passed for parity in f.parity)]
    champions = [f for f in report.forms if f"{report.name}@champion" in f.aliases]
    return next(reversed(champions or let_through), None)


def tile_row(tiles: Sequence[tuple[str, str, str]]) -> str:
    """Tiles of (name, value, note)."""
    cells = "".join(
        f'<div class="tile"><span class="name">{escape(name)}</span><b>{escape(value)}</b>'
        f'<span class="small soft">{escape(note)}</span></div>'
        for name, value, note in tiles
    )
    return f'<div class="tiles">{cells}</div>'


_KNOWN_STATES = ("complete", "stopped", "failed", "infeasible", "running", "paused", "waiting")


def _search(report: StudyReport) -> str:
    charts = learning_curves(report)
    if not charts:
        return empty("No trial has reported yet.")
    drawn, of_all = len(curves_drawn(report)), len(report.trials)
    words = f"The best {drawn} of {of_all} trials are drawn." if drawn < of_all else ""
    return curves_key(report) + (note(words) if words else "") + charts_or(charts, "")


def _trade_offs_heading(report: StudyReport) -> str:
    return "Pareto front" if len(report.objectives) > 1 else "Trade-offs"


def _trade_offs(report: StudyReport) -> str:
    charts = trade_offs(report)
    if not charts:
        return empty("No trial has reported yet.")
    words = "The dotted line is the best value that so much size or time buys. "
    if len(report.objectives) > 1:
        words = (
            "No other complete trial beats one of the front in every searched metric. The dotted "
            "line is the front of the two that a chart shows. "
        )
    key = trade_offs_key(report) + note(words + undrawn_words(report))
    return key + charts_or(charts, "") + front_table(report)


def charts_or(charts: Sequence[tuple[str, str]], missing: str) -> str:
    """Cards of (heading, SVG), or a box that says what is missing."""
    if not charts:
        return empty(missing)
    cards = "".join(f'<div class="card"><h3>{escape(h)}</h3>{svg}</div>' for h, svg in charts)
    return f'<div class="grid2">{cards}</div>'


def _importances(report: StudyReport) -> str:
    svg = importance_bars(report)
    if svg is None:
        return empty(
            f"At least {MIN_TRIALS} trials with results, and a setting that varied, are needed."
        )
    key = note(
        "How far one setting alone explains the order of the trials (ε², corrected for chance); p "
        "is how often shuffled results explain as much. With few trials read it as a hint."
    )
    return f'{key}<div class="card single">{svg}</div>'


def _finals(report: StudyReport) -> list[Section]:
    if report.finals is None:
        return []
    return [Section("finalists", "Finalists", finals_table(report.finals))]


def _recipes(report: StudyReport) -> str:
    parts = []
    if report.chosen_recipe is not None:
        parts.append(
            "<details open><summary>Chosen, complete</summary>"
            f"<pre>{escape(report.chosen_recipe)}</pre></details>"
        )
    parts.append(
        "<details><summary>The study's recipe, with holes</summary>"
        f"<pre>{escape(report.recipe)}</pre></details>"
    )
    return "".join(parts)


def _footer(report: StudyReport) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report.tool_versions.items())
    text = "Everything on this page is in <code>report.json</code> beside it."
    return f"<footer>{text} {escape(versions)}</footer>"
