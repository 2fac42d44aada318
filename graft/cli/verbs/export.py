"""`graft export`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graft.cli.console import verb
from graft.cli.options import AdapterReference, AsJson, Home

if TYPE_CHECKING:
    from rich.console import Console

    from graft.pipelines.export import ExportResult


class Format(StrEnum):
    """What may be written."""

    PEFT = "peft"
    MERGED = "merged"


To = Annotated[
    Path, typer.Option("--to", metavar="DIR", help="The folder to make.", show_default=False)
]
As = Annotated[
    Format, typer.Option("--format", help="An adapter for PEFT, or a whole merged model.")
]


def show(result: ExportResult, console: Console) -> None:
    """Prints where it is."""
    readers = "read back whole, by PEFT too" if result.is_read_by_peft else "read back whole"
    console.print(f"{result.format}: {result.path} ({result.num_bytes:,} bytes, {readers})")


@verb(show)
def command(
    adapter: AdapterReference,
    to: To,
    format: As = Format.PEFT,
    home: Home = None,
    as_json: AsJson = False,
) -> ExportResult:
    """Write an adapter as a folder that other programs load."""
    from graft.cli.progress import terminal_progress
    from graft.core.home import resolve_home
    from graft.pipelines.export import export

    return export(
        adapter, to, home=resolve_home(home), format=format.value, progress=terminal_progress()
    )
