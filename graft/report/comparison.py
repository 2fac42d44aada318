"""The page of a comparison: one table, its Pareto plots, how each method came to its row."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from graft.report.comparison_facts import Comparison, MethodFacts
from graft.report.comparison_table import columns
from graft.report.figures import setting, staircase
from graft.report.page import Section, charts_or, document, tile_row
from graft.report.svg import Line, Marks, Point, Rule, number, plot
from graft.report.tables import Cell, empty, note, pill, table
from graft.report.words import bytes_words, duration_words, interval_words, short_name

_MEMORY_WORDS = {
    "process": "Peak memory is the highest resident memory of the training process (VmHWM: base, "
    "adapter, optimizer, activations, Python and its libraries) over its training steps; "
    "evaluations are left out.",
    "device": "Peak memory is the most that torch had allocated on the device during the training "
    "steps; evaluations are left out.",
}


def render_comparison(comparison: Comparison) -> str:
    """Returns the whole page."""
    sections = [
        Section("methods", "Methods", _methods(comparison)),
        Section("trade-offs", "Trade-offs", _trade_offs(comparison)),
        Section("learning", "Held-out loss while training", _learning(comparison)),
        Section("search", "What was searched", _searched(comparison)),
        Section("recipe", "Recipe", f"<pre>{escape(comparison.recipe)}</pre>"),
    ]
    return document(
        f"{escape(comparison.name)}: methods compared",
        f"{escape(comparison.base)} · {escape(comparison.created_at)}",
        sections,
        _tiles(comparison),
        _footer(comparison),
    )


def explanation(comparison: Comparison) -> str:
    """Says in words how the figures came about, for the page and for documents."""
    c = comparison
    memory = next((seed.memory for row in c.methods for seed in row.seeds), "process")
    loss = "" if c.common_loss is None else f" ({number(c.common_loss)} nats a token)"
    return (
        f"Each method was searched over {c.budget} points of {c.search_steps} steps in its own "
        f"vetted space, ranked by {c.searched}; its best was trained {c.num_seeds} times for "
        f"{c.steps} steps of {c.batch_size} rows, on seeds that the search had not seen. Each of "
        "these ran alone, in a process of its own. Values are means over them, "
        "intervals reach from the lowest to the highest end of their bootstrap intervals "
        f"over held-out rows. {_MEMORY_WORDS[memory]} Seconds to the same loss: training time "
        f"until the lowest held-out loss that all methods reached{loss}, those aside that never "
        "came below the lowest loss before training. Forgetting is the growth of the perplexity on "
        "general text."
    )


def _tiles(comparison: Comparison) -> str:
    done = [row for row in comparison.methods if row.state == "done"]
    told = ", ".join(
        f"{count} {state}"
        for state in ("done", "refused", "failed")
        if (count := sum(row.state == state for row in comparison.methods))
    )
    tiles = [("methods", str(len(comparison.methods)), told)]
    sign = 1 if comparison.quality_mode == "min" else -1
    measured = [row for row in done if comparison.quality in row.metrics]
    if measured:
        best = min(measured, key=lambda row: sign * row.metrics[comparison.quality].value)
        value = best.metrics[comparison.quality]
        tiles.append(
            (
                f"best {comparison.quality}",
                best.name,
                f"{number(value.value)} {interval_words(value)}",
            )
        )
    for name, attribute in (("least memory", "peak_bytes"), ("smallest file", "file_bytes")):
        if done:
            least = min(done, key=lambda row: getattr(row, attribute))
            tiles.append((name, least.name, bytes_words(getattr(least, attribute))))
    tiles.append(("training time", duration_words(comparison.seconds), "all points and seeds"))
    return tile_row(tiles)


def _methods(comparison: Comparison) -> str:
    if not comparison.methods:
        return empty("No method was compared.")
    shown = columns(comparison)
    head = [Cell(escape(column.heading), "num" if column.is_number else "") for column in shown]
    rows = [
        (
            "best" if row.name in comparison.front else "",
            [
                Cell(
                    escape(column.text(row)),
                    "num" if column.is_number else "wide" if column.heading == "why not" else "",
                )
                for column in shown
            ],
        )
        for row in comparison.methods
    ]
    key = "Green: no other method is better in quality, memory and size at once."
    return note(escape(explanation(comparison))) + note(key) + table(head, rows)


def _trade_offs(comparison: Comparison) -> str:
    quality, is_max = comparison.quality, comparison.quality_mode == "max"
    shown = [row for row in comparison.methods if row.state == "done" and quality in row.metrics]
    values = [row.metrics[quality].value for row in shown]
    memory = [(row.peak_bytes or 0) / 1e6 for row in shown]
    size = [(row.file_bytes or 0) / 1e6 for row in shown]
    axes = [
        ("peak memory, MB", memory, quality, values, is_max),
        ("file size, MB", size, quality, values, is_max),
        ("file size, MB", size, "peak memory, MB", memory, False),
    ]
    charts = [
        (f"{y_label} against {x_label}", _scatter(comparison, shown, x_label, x, y_label, y, best))
        for x_label, x, y_label, y, best in axes
        if shown
    ]
    key = note(
        "Green: on the front of all three. The dotted line is the front of the two that a plot "
        "shows."
    )
    return (key if charts else "") + charts_or(charts, "No method was trained to its end.")


def _scatter(
    comparison: Comparison,
    rows: Sequence[MethodFacts],
    x_label: str,
    x: Sequence[float],
    y_label: str,
    y: Sequence[float],
    is_max: bool,
) -> str:
    points: dict[str, list[Point]] = {"done": [], "best": []}
    for row, at, value in zip(rows, x, y, strict=True):
        tip = f"{row.name}: {y_label} {number(value)}, {x_label} {number(at)}"
        kind = "best" if row.name in comparison.front else "done"
        points[kind].append(Point(at, value, tip, row.name))
    every = [Point(at, value) for at, value in zip(x, y, strict=True)]
    return plot(
        x_label=x_label,
        y_label=y_label,
        title=f"{y_label} against {x_label}",
        lines=[Line(staircase(every, is_max=is_max), "front")],
        marks=[Marks(points["done"], "done"), Marks(points["best"], "best", "diamond")],
        x_log=True,
        y_log=y_label.endswith("MB"),
        height=400,
    )


def _learning(comparison: Comparison) -> str:
    lines, ends = [], []
    for row in comparison.methods:
        if not row.seeds:
            continue
        curve = row.seeds[0].curve
        tip = f"{row.name}, seed {row.seeds[0].seed}"
        points = [
            Point(p.seconds, p.loss, f"{tip}: step {p.steps}, {number(p.loss)}") for p in curve
        ]
        css = "best" if row.name in comparison.front else "done"
        lines.append(Line(points, css))
        ends.append(Marks([points[-1]._replace(label=row.name)], css))
    if not lines:
        return empty("No method was trained to its end.")
    rules = []
    if comparison.common_loss is not None:
        rules = [Rule(comparison.common_loss, "y", "limit", "the same loss")]
    svg = plot(
        x_label="training time, s",
        y_label="held-out loss, nats a token",
        title="Held-out loss by training time",
        lines=lines,
        marks=ends,
        rules=rules,
        height=420,
    )
    key = note("The first seed of each method. Green: on the front.")
    return f'{key}<div class="card single">{svg}</div>'


def _searched(comparison: Comparison) -> str:
    head = [
        Cell("method"),
        Cell("point"),
        Cell("state"),
        Cell(escape(comparison.searched), "num"),
        Cell("time", "num"),
        Cell("why"),
    ]
    rows = []
    for row in comparison.methods:
        for point in row.points:
            is_best = point.state == "complete" and point.params == row.settings
            value = point.metrics.get(comparison.searched)
            words = ", ".join(f"{short_name(k)} {setting(v)}" for k, v in point.params.items())
            cells = [
                Cell(escape(row.name)),
                Cell(escape(words)),
                Cell(pill(point.state, "good" if point.state == "complete" else "bad")),
                Cell("" if value is None else number(value), "num"),
                Cell(duration_words(point.seconds), "num"),
                Cell(escape(point.reason or ""), "wide" if point.reason else ""),
            ]
            rows.append(("best" if is_best else "", cells))
    if not rows:
        return empty("No point was searched.")
    return note("Green: trained to the end.") + table(head, rows)


def _footer(comparison: Comparison) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in comparison.tool_versions.items())
    text = "Everything on this page is in <code>comparison.json</code> beside it."
    return f"<footer>{text} {escape(comparison.machine)}. {escape(versions)}</footer>"
