"""`graft plan`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graft.cli.console import verb
from graft.cli.options import AsJson, Home, Overrides

if TYPE_CHECKING:
    from rich.console import Console

    from graft.pipelines.advise import Advice
    from graft.pipelines.plan import Plan, PlannedBranch

PlannedRecipe = Annotated[
    Path | None,
    typer.Argument(metavar="[RECIPE]", help="The recipe file.", show_default=False),
]
Gpu = Annotated[
    str | None,
    typer.Option(
        "--gpu",
        metavar="GPUS",
        help="Plan for these, as in --gpu '4x A100-40GB'; default: this machine.",
        show_default=False,
    ),
]
ClusterFile = Annotated[
    Path | None,
    typer.Option(
        "--cluster",
        metavar="FILE",
        help="Plan for the GPUs of a `ray up` or KubeRay file; --gpu names them where it does not.",
        show_default=False,
    ),
]
Price = Annotated[
    float | None,
    typer.Option("--price", min=0, help="Dollars an hour of one device.", show_default=False),
]
HostMemory = Annotated[
    str | None,
    typer.Option(
        "--host-memory",
        metavar="SIZE",
        help="Host memory for each GPU, as in 256GB; default: 200 GiB, 64 GiB beside an RTX.",
        show_default=False,
    ),
]
Advises = Annotated[
    bool,
    typer.Option("--advise", help="Answer with a recipe for --model on --gpu; takes no RECIPE."),
]
Model = Annotated[
    str | None,
    typer.Option("--model", help="With --advise: a hub id or a folder.", show_default=False),
]
MethodType = Annotated[
    str | None,
    typer.Option(
        "--method",
        help="With --advise: the method to find a combination for; lora where none is named.",
        show_default=False,
    ),
]


def show(record: Plan | Advice, console: Console) -> None:
    """Prints what was planned, or the advised recipe."""
    from graft.pipelines.advise import Advice

    if isinstance(record, Advice):
        _show_advice(record, console)
    else:
        _show_plan(record, console)


def _show_plan(record: Plan, console: Console) -> None:
    """The space, the kinds of trials with their memory, time, and what can be combined."""
    from rich.table import Table

    from graft.methods.support import COLUMNS

    count = "uncountable" if record.num_combinations is None else f"{record.num_combinations:,}"
    console.print(
        f"{record.name}: {record.trials} trials of {count} combinations, "
        f"{', '.join(record.objectives)}, scheduler {record.scheduler}"
    )
    if record.parameters:
        console.print(f"sampler {record.sampler}")
    if record.warning:
        console.print(record.warning)
    if record.spending:
        console.print(f"spent: {record.spending.words}; left: {record.spending.left}")
    space = Table("setting", "values", "only with", box=None, pad_edge=False)
    for parameter in record.parameters:
        only = ", ".join(f"{name} = {label}" for name, label in parameter.opened_by.items())
        space.add_row(parameter.name, parameter.space, only)
    console.print(space if record.parameters else "nothing is open: one recipe, one run")
    console.print(f"planned for {record.hardware}")
    branches = Table("kind of trial", "method", "executor", "memory", box=None, pad_edge=False)
    for branch in record.branches:
        chosen = ", ".join(f"{name} = {label}" for name, label in branch.choices.items())
        told = f"{branch.executor}: {branch.reason}" if branch.reason else branch.executor
        branches.add_row(chosen or "all", branch.method or "-", told, _memory(branch))
    console.print(branches)
    _show_time(record, console)
    table = Table(*COLUMNS, box=None, pad_edge=False)
    for method in record.compatibility:
        table.add_row(*method.cells())
    console.print(table)


def _memory(branch: PlannedBranch) -> str:
    """The worst point's peak with its largest parts; what would fit where it does not."""
    from graft.core.settings import settings_in_words
    from graft.core.sizes import format_bytes

    memory = branch.memory
    if memory is None:
        return "-"
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in memory.largest.items())
    told = f"{format_bytes(memory.device_bytes)} of {format_bytes(memory.limit_bytes)}: {parts}"
    if memory.host_bytes:
        told += f"; host {format_bytes(memory.host_bytes)}"
    if memory.nvme_bytes:
        told += f"; NVMe {format_bytes(memory.nvme_bytes)}"
    if memory.slots > 1:
        told += f"; {memory.slots} together on one base"
    if not memory.reason:
        return told
    fits = " | ".join(settings_in_words(changes) for changes in memory.alternatives)
    return f"does not fit: {told}\nfits with: {fits or 'nothing that is known'}"


def _show_time(record: Plan, console: Console) -> None:
    if record.unknown:
        console.print(f"not predicted: {record.unknown}")
    if record.time is None:
        return
    time = record.time
    console.print(
        f"{time.low_hours:.3g} to {time.high_hours:.3g} hours on {time.devices} at once"
        + (f", ${time.low_dollars:.2f} to ${time.high_dollars:.2f}" if time.low_dollars else "")
        + f" ({time.basis})"
    )


def _show_advice(record: Advice, console: Console) -> None:
    from graft.core.settings import settings_in_words
    from graft.core.sizes import format_bytes

    console.print(record.recipe)
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in record.largest.items())
    console.print(
        f"# {record.hardware}: {format_bytes(record.device_bytes)} of "
        f"{format_bytes(record.device_memory)} on each ({parts}), "
        f"{format_bytes(record.host_bytes)} of host memory beside each"
    )
    for changes in record.alternatives:
        console.print(f"# fits too: {settings_in_words(changes)}")


@verb(show)
def command(
    recipe: PlannedRecipe = None,
    overrides: Overrides = None,
    gpu: Gpu = None,
    cluster: ClusterFile = None,
    price: Price = None,
    host_memory: HostMemory = None,
    advises: Advises = False,
    model: Model = None,
    method: MethodType = None,
    home: Home = None,
    as_json: AsJson = False,
) -> Plan | Advice:
    """Show what a search would try, need and cost; or advise a recipe. Trains nothing."""
    from graft.core.errors import ConfigError
    from graft.core.home import resolve_home

    folder = resolve_home(home)
    if advises:
        if model is None or recipe is not None:
            raise ConfigError(
                "--advise answers with a recipe, so it takes none; give --model and --gpu"
            )
        if overrides or price is not None:
            raise ConfigError("--set and --price are of a RECIPE's plan; --advise takes none")
        from graft.pipelines.advise import advise

        return advise(
            model,
            home=folder,
            gpu=gpu,
            cluster=cluster,
            method=method or "lora",
            host_memory=host_memory,
        )
    if recipe is None:
        raise ConfigError("give a RECIPE to plan, or --advise with --model and --gpu")
    if model is not None or method is not None:
        raise ConfigError(
            "--model and --method are of --advise; a RECIPE has its own: use --set method.type=..."
        )
    from graft.pipelines.plan import plan
    from graft.recipe import load_recipe

    space = load_recipe(recipe, overrides or ())
    return plan(space, home=folder, gpu=gpu, cluster=cluster, price=price, host_memory=host_memory)
