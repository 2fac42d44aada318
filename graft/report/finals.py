"""The finalists of a search as a table of the report."""

from __future__ import annotations

from html import escape

from graft.report.figures import setting
from graft.report.finals_facts import FinalistFacts, Finals, RerunFacts
from graft.report.svg import number
from graft.report.tables import Cell, note, table
from graft.report.words import short_name


def finals_table(finals: Finals) -> str:
    """Every finalist with its mean, its interval and what each seed gave, the best one first."""
    params = sorted({name for finalist in finals.finalists for name in finalist.params})
    head = [
        Cell("trial"),
        *(Cell(escape(short_name(name))) for name in params),
        Cell("in the search", "num"),
        Cell(f"mean {escape(finals.metric)}", "num"),
        Cell(f"{finals.confidence:.0%} interval", "num"),
        *(Cell(f"seed {seed}", "num") for seed in finals.seeds),
        Cell("why"),
    ]
    rows = []
    for place, finalist in enumerate(finals.finalists):
        published = finals.published_seed if place == 0 else None
        reasons = "; ".join(
            f"seed {rerun.seed}: {rerun.reason}" for rerun in finalist.reruns if rerun.reason
        )
        cells = [
            Cell(str(finalist.number)),
            *(
                Cell(escape(setting(finalist.params[name])) if name in finalist.params else "")
                for name in params
            ),
            Cell(number(finalist.searched), "num"),
            Cell("" if finalist.mean is None else number(finalist.mean), "num"),
            Cell(interval_text(finalist), "num"),
            *(Cell(rerun_text(rerun, published), "num") for rerun in finalist.reruns),
            Cell(escape(reasons), "wide" if reasons else ""),
        ]
        rows.append(("best" if published is not None else "", cells))
    key = note(
        "The best trials of the search, trained again on seeds that it had not seen. The interval "
        "is Student's t over the seeds, for the mean. ★ published: the run that is nearest to it."
    )
    return note(f"<b>{escape(finals.verdict)}</b>") + key + table(head, rows)


def interval_text(finalist: FinalistFacts) -> str:
    """`[0.41, 0.47]`, or nothing where it is not known."""
    if finalist.low is None or finalist.high is None:
        return ""
    return f"[{number(finalist.low)}, {number(finalist.high)}]"


def rerun_text(rerun: RerunFacts, published: int | None) -> str:
    """What a seed gave, or why not; starred where it is published."""
    if rerun.value is None:
        return rerun.state
    return number(rerun.value) + (" ★" if rerun.seed == published else "")
