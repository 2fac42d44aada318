"""`graft doctor`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from graft.cli.console import verb
from graft.cli.options import AsJson, Home

if TYPE_CHECKING:
    from rich.console import Console

    from graft.pipelines.environment import Health
    from graft.pipelines.support import Support

_STYLES = {"ok": "green", "note": "yellow", "broken": "bold red"}
_HEADINGS = {
    "model.quantization ": "",
    "scale.zero_stage": "ZeRO",
    "scale.gradient_checkpointing": "recompute",
    "scale.": "",
}

BuildOps = Annotated[
    bool,
    typer.Option(
        "--build-ops",
        help="Build DeepSpeed's C++ ops now, once, and clear what killed builds left.",
    ),
]


def show(record: Health, console: Console) -> None:
    """Prints one line a finding, its fix below, then what trains here and why not the rest."""
    from rich.text import Text

    for finding in record.findings:
        mark = Text(f"{finding.status:7}", style=_STYLES[finding.status])
        console.print(Text.assemble(mark, f"{finding.subject}: {finding.found}"))
        if finding.fix:
            console.print(f"       {finding.fix}", style="dim")
    if record.support is not None:
        _show_support(record.support, console)


def _show_support(support: Support, console: Console) -> None:
    from rich.table import Table

    for setting in support.settings:
        if setting.reason:
            console.print(f"not here: {setting.setting}: {setting.reason}")
    names = [setting.setting for setting in support.settings]
    table = Table("trains here", *map(_heading, names), box=None, pad_edge=False)
    for method in support.methods:
        marks = ("yes" if name in method.trains_with else "no" for name in names)
        table.add_row(method.method, *marks)
    console.print(table)
    machine = {setting.reason for setting in support.settings}
    for method in support.methods:
        own: dict[str, list[str]] = {}
        for name, why in method.reasons.items():
            if why not in machine:
                own.setdefault(why.rpartition("; ")[2], []).append(_heading(name))
        for works, refused in own.items():
            told = f"{method.method} does not train with {', '.join(refused)}; {works}"
            console.print(told, style="dim")


def _heading(setting: str) -> str:
    """A setting as a column's head: `ZeRO 3`, `nf4`."""
    for written, short in _HEADINGS.items():
        setting = setting.replace(written, short)
    return setting


@verb(show, refusal=lambda record: record.refusal)
def command(build_ops: BuildOps = False, home: Home = None, as_json: AsJson = False) -> Health:
    """Look for what would stop or slow GRAFT on this machine, and what can be trained on it."""
    from graft.cli.progress import terminal_progress
    from graft.core.home import resolve_home
    from graft.pipelines.environment import inspect_environment

    home_folder = resolve_home(home)
    return inspect_environment(home_folder, build=build_ops, progress=terminal_progress())
