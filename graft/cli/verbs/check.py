"""`graft check`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from graft.cli.console import verb
from graft.cli.options import AsJson, Home, Overrides, RecipePath

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from graft.data.prepare import DataProof, SplitProof
    from graft.pipelines.check import CheckReport, RenderedRow

Samples = Annotated[int, typer.Option("--samples", min=0, help="Training rows to show.")]


def show(report: CheckReport, console: Console) -> None:
    """Prints the proof as a table, then training rows with what is learned told apart."""
    from rich.table import Table

    console.print(f"base      {report.model.source}  {report.model.digest[:12]}")
    console.print(f"context   {report.context_tokens} tokens; rows up to {report.data.max_length}")
    console.print(
        f"data      {report.data.digest[:12]}  template {report.data.template_digest[:12]}"
    )
    table = Table(box=None, header_style="bold", pad_edge=False)
    headings = "examples rows tokens learned tokens/row learned/row cut twice"
    for heading in ("", *headings.split()):
        table.add_column(heading, justify="left" if not heading else "right")
    _add_proof(table, report.data, "")
    if report.feedback is not None:
        _add_proof(table, report.feedback, "feedback ")
    console.print(table)
    if report.data.num_shared_prompts:
        console.print(
            f"warning: {report.data.num_shared_prompts} held-out prompts are also training "
            "prompts, "
            "with another answer",
            style="yellow",
        )
    for row in report.samples:
        _show_row(row, console)


def _add_proof(table: Table, proof: DataProof, prefix: str) -> None:
    for name, split in proof.splits.items():
        _add_split(table, prefix + name, split)


def _add_split(table: Table, name: str, split: SplitProof) -> None:
    spreads = (split.tokens_per_row, split.supervised_tokens_per_row)
    table.add_row(
        name,
        f"{split.num_examples:,}",
        f"{split.num_rows:,}",
        f"{split.num_tokens:,}",
        f"{split.num_supervised_tokens:,}",
        *(f"{spread.min} … {spread.median:g} … {spread.max}" for spread in spreads),
        str(split.num_truncated),
        str(split.num_duplicates),
    )


def _show_row(row: RenderedRow, console: Console) -> None:
    """Prints a row; without colours, what is learned stands between marks."""
    from rich.text import Text

    left, right = ("", "") if console.color_system else ("⟦", "⟧")
    text = Text()
    last, has_answers = 0, not row.segments[0].branch and row.segments[-1].branch > 1
    for segment in row.segments:
        if has_answers and segment.branch != last:
            text.append("" if text.plain.endswith("\n") else "\n")
            text.append(f"answer {segment.branch}: ", style="bold")
        last = segment.branch
        if segment.is_supervised:
            text.append(f"{left}{segment.text}{right}", style="bold green")
        else:
            text.append(segment.text, style="dim")
    learned = sum(segment.num_tokens for segment in row.segments if segment.is_supervised)
    told = "sampled answers are learned" if row.is_asked else f"{learned} tokens are learned"
    if row.is_wanted is not None:
        told += ", wanted" if row.is_wanted else ", unwanted"
    console.rule(f"{row.source}: {told}", style="dim")
    console.print(text, soft_wrap=True)


@verb(show)
def command(
    recipe: RecipePath,
    overrides: Overrides = None,
    home: Home = None,
    samples: Samples = 2,
    as_json: AsJson = False,
) -> CheckReport:
    """Prove model and data: what is learned of each row, lengths, duplicates, leakage."""
    from graft.cli.progress import terminal_progress
    from graft.core.home import resolve_home
    from graft.pipelines.check import check
    from graft.recipe.load import load_recipe

    space = load_recipe(recipe, overrides or ())
    progress = terminal_progress()
    return check(space, home=resolve_home(home), num_samples=samples, progress=progress)
