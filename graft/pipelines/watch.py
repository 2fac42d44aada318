"""`watch`: a drift monitor for a served name, fitted to the prompts its adapter learned from."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from graft.core.files import sha256_json
from graft.core.progress import QUIET, Progress
from graft.pipelines.reference import choose_prompts, save_reference
from graft.pipelines.renewal_data import require_gate_rows
from graft.recipe.mixture import require_single, sources_of
from graft.runtime.driftwatch import MonitorSettings, Reference, build_detectors
from graft.runtime.loopstate import LoopStatus, loop_folder, loop_timeline, read_status

if TYPE_CHECKING:
    from graft.recipe.space import RecipeSpace


def watch(
    space: RecipeSpace,
    *,
    home: Path,
    name: str | None = None,
    renews: bool = False,
    progress: Progress = QUIET,
) -> LoopStatus:
    """Fits the reference and starts the monitor, or finds both as they are.

    Call it inside a Ray session; the monitor outlives the caller as long as the cluster lives.

    Args:
        space: The recipe.
        home: Where the journal is.
        name: The served name; None means the recipe's.
        renews: Start a renewal on drift; False only watches.
        progress: Told of the stages.

    Raises:
        ConfigError: The run length cannot be kept, or a renewal lacks its data.
        DataError: The training prompts make no reference.
    """
    import ray

    from graft.pipelines.loop import renewal_task
    from graft.runtime.monitor import start_monitor

    settings = monitor_settings(space, home=home, name=name, renews=renews, progress=progress)
    monitor = start_monitor(settings, renewal_task if renews else None)
    status: LoopStatus = ray.get(monitor.status.remote())
    return status


def monitor_settings(
    space: RecipeSpace, *, home: Path, name: str | None, renews: bool, progress: Progress
) -> MonitorSettings:
    """Checks everything, fits the reference if there is none yet, and says how to start."""
    sections = space.sections()
    name = name or sections.name
    if renews:
        require_gate_rows(require_single(sections.data, "a renewal"), sections.loop)
    build_detectors(sections.watch)  # refuses what cannot work before a model is loaded
    return MonitorSettings(
        name=name,
        home=str(home),
        recipe=space.content(),
        watch=sections.watch,
        cooldown_s=sections.loop.cooldown_s,
        reference=fit_reference(space, home=home, name=name, progress=progress),
        renews=renews,
    )


def fit_reference(
    space: RecipeSpace, *, home: Path, name: str, progress: Progress = QUIET
) -> Reference:
    """Embeds training prompts into `loops/<name>/`; the same base and prompts, the same file."""
    from graft.data import load_examples
    from graft.engine.multi import MultiAdapterModel
    from graft.models import load_model, load_tokenizer, resolve_model

    sections = space.sections()
    ready = resolve_model(sections.model, home, progress=progress)
    sources = sources_of(sections.data)
    examples = [
        example
        for of in sources
        for example in load_examples(of.train, of.format, system=of.system, limit=of.limit)
    ]
    texts = choose_prompts(examples, sections.watch)
    key = sha256_json([ready.digest, sections.model.dtype, texts])
    file = f"reference-{key[:12]}.npz"
    path = loop_folder(home, name) / file
    if not path.exists():
        progress.note(f"watch: embedding {len(texts)} training prompts as the reference")
        model = MultiAdapterModel(load_model(ready, sections.model))
        save_reference(path, model, load_tokenizer(ready), texts)
    files = ", ".join(source.train for source in sources)
    return Reference(file=file, num_rows=len(texts), key=key, source=f"training rows {files}")


def follow(home: Path, name: str, progress: Progress, *, every_s: float = 0.5) -> None:
    """Tells each new event of a loop as a line, until it is interrupted or the monitor is stopped.

    It reads the journal alone: any process that sees the home may follow.
    """
    num_told = 0
    while True:
        timeline = loop_timeline(home, name)
        for entry in timeline[num_told:]:
            progress.note(f"{entry.num_prompts:>8} prompts  {entry.state:<10}  {entry.label}")
        num_told = len(timeline)
        if read_status(home, name).is_stopped:
            return
        time.sleep(every_s)
