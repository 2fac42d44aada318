"""The one table of a comparison, as columns of text: for the page, the terminal and Markdown."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from graft.artifacts.record import MetricValue
from graft.report.comparison_facts import Comparison, MethodFacts
from graft.report.svg import number
from graft.report.words import bytes_words


class Column(NamedTuple):
    """A column: its heading, and the text of a row."""

    heading: str
    text: Callable[[MethodFacts], str]
    is_number: bool = True


def columns(comparison: Comparison) -> list[Column]:
    """Returns the columns in reading order; those that nothing stands in are left out."""
    measured = [row for row in comparison.methods if row.state == "done"]
    names = list(dict.fromkeys(name for row in measured for name in row.metrics))
    # Perplexity says the same as the loss, of all rows and of each source of a mixture.
    metrics = [n for n in names if n != "eval/perplexity" and not n.endswith("/loss")]
    found = [
        Column("method", lambda row: row.name, is_number=False),
        Column("trainable", _trainable),
        Column("peak memory", lambda row: _bytes(row.peak_bytes)),
        Column("tokens/s", lambda row: _number(row.tokens_per_s)),
        Column("s to the same loss", _seconds),
        Column("file", lambda row: _bytes(row.file_bytes)),
        Column("perplexity", lambda row: _value(row.metrics.get("eval/perplexity"))),
        *(Column(_heading(name), _metric(name)) for name in metrics),
        Column("general perplexity", _general),
        Column("forgetting", _forgetting),
        Column("mergeable", lambda row: _yes(row, row.mergeable), is_number=False),
        Column("served unmerged by", _served, is_number=False),
        Column("why not", _reason, is_number=False),
    ]
    return [
        column
        for column in found
        if column.heading == "method" or any(column.text(row) for row in comparison.methods)
    ]


def markdown_table(comparison: Comparison) -> str:
    """The same as a Markdown table."""
    shown = columns(comparison)
    lines = [
        [column.heading for column in shown],
        ["---:" if column.is_number else "---" for column in shown],
        *([column.text(row).replace("|", "\\|") for column in shown] for row in comparison.methods),
    ]
    return "\n".join(f"| {' | '.join(' '.join(cell.split()) for cell in line)} |" for line in lines)


def _heading(metric: str) -> str:
    return metric.removeprefix("eval/").replace("_", " ")


def _trainable(row: MethodFacts) -> str:
    if row.num_trainable is None or row.trainable_share is None:
        return ""
    return f"{row.num_trainable:,} ({row.trainable_share:.3%})"


def _seconds(row: MethodFacts) -> str:
    if row.seconds_to_loss is None:
        return "never" if row.seeds else ""
    return number(row.seconds_to_loss)


def _metric(name: str) -> Callable[[MethodFacts], str]:
    return lambda row: _value(row.metrics.get(name))


def _general(row: MethodFacts) -> str:
    if row.general is None or row.general_before is None:
        return ""
    return f"{number(row.general_before)} → {_value(row.general)}"


def _forgetting(row: MethodFacts) -> str:
    return "" if row.forgetting is None else f"{row.forgetting:+.1%}"


def _served(row: MethodFacts) -> str:
    return _yes(row, bool(row.servable), ", ".join(row.servable))


def _yes(row: MethodFacts, is_so: bool, word: str = "yes") -> str:
    if row.state != "done":
        return ""
    return word if is_so else "no"


def _reason(row: MethodFacts) -> str:
    return "" if row.state == "done" else f"{row.state}: {row.reason}"


def _value(value: MetricValue | None) -> str:
    if value is None:
        return ""
    if value.low is None or value.high is None:
        return number(value.value)
    return f"{number(value.value)} [{number(value.low)}, {number(value.high)}]"


def _number(value: float | None) -> str:
    return "" if value is None else number(value)


def _bytes(value: int | None) -> str:
    return "" if value is None else bytes_words(value)
