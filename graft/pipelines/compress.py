"""`compress`: an adapter through the recipe's compressors, past the parity gate, into the store."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from graft.artifacts import MetricValue, Parent, ParityReport, Store, StoredAdapter
from graft.core.errors import ConfigError
from graft.core.model import StrictModel
from graft.core.progress import QUIET, Progress

if TYPE_CHECKING:
    from graft.compressors.base import Adapter, Compressor
    from graft.engine.run import LoadedRun
    from graft.recipe.sections import Recipe


class CompressResult(StrictModel):
    """What became of an adapter."""

    digest: str
    """Of the compressed adapter, published."""
    parent: str | None
    """Digest of the adapter it was made from; None for a plain folder."""
    steps: tuple[str, ...]
    """Compressors in their order."""
    r_before: int | None
    r_after: int | None
    bf16_bytes: int
    """What the original adapter's tensors take in bf16."""
    num_bytes: int
    """What the compressed adapter takes on disk, every file counted."""
    bytes_fraction: float
    """`num_bytes / bf16_bytes`."""
    parity: ParityReport
    metrics: dict[str, MetricValue]
    """Of the compressed adapter; empty without held-out rows."""
    parent_metrics: dict[str, MetricValue]


def compress(
    reference: str,
    recipe: Recipe | None = None,
    *,
    home: Path,
    progress: Progress = QUIET,
    run: LoadedRun | None = None,
) -> CompressResult:
    """Compresses an adapter and publishes the result, if it is still the same adapter.

    Args:
        reference: A name, a digest, or an adapter folder.
        recipe: None is the one that the adapter was trained with.
        home: Where adapters and models are.
        progress: Told of every stage.
        run: Base and rows, where the caller has them loaded.

    Raises:
        ConfigError: The recipe names no compressor.
        AdapterError: The adapter is unknown, damaged, or of another base.
        CompressionError: A compressor does not fit the adapter.
        GateRefusedError: The result says something else; nothing is published.
    """
    from graft.compressors.folder import load_adapter
    from graft.engine.parity import Form, require_parity
    from graft.engine.publish import publish_adapter, require_answers, require_base
    from graft.engine.run import evaluate_run, load_run
    from graft.pipelines.forms import compare_forms, form_name, recipe_of, seated

    store = Store(home)
    stored = store.resolve(reference, allow_folder=True)
    require_answers(stored, "compress")
    recipe = recipe or recipe_of(stored)
    steps = [step for step in recipe.compress if step.type != "none"]
    if not steps:
        raise ConfigError("compress: the recipe lists no compressor; add compress: [{type: svd}]")
    if known := _compressed_before(store, stored, recipe):
        return _result(stored, load_adapter(stored.path), known)
    original = load_adapter(stored.path)
    small = _compressed(original, steps, progress)
    run = run or load_run(recipe, home)
    require_base(stored, run.ready, run.recipe.model)
    with seated(run, original, small) as (slot_before, slot_after):
        before = Form(form_name(stored), run.model, slot_before)
        after = Form("+".join(step.type for step in steps), run.model, slot_after)
        parity = compare_forms(run, before, after, recipe, progress)
        require_parity(parity)
        metrics: dict[str, MetricValue] = {}
        if run.prepared.eval:
            metrics = evaluate_run(run, slot_after, progress=progress).metrics
    parents = (Parent(digest=stored.digest, relation="compressed"),) if stored.digest else ()
    published = publish_adapter(
        store,
        small,
        recipe=recipe,
        ready=run.ready,
        data_digest=stored.record.data_digest,
        metrics=metrics,
        parents=parents,
        parity=(parity,),
    )
    return _result(stored, original, published)


def _compressed(original: Adapter, steps: Sequence[Compressor], progress: Progress) -> Adapter:
    """Runs the compressors; what comes back was on disk once: the gate judges what is served."""
    from graft.compressors.folder import load_adapter, save_adapter

    small = original
    for step in steps:
        progress.note(f"compress: {step.type}")
        small = step.compress(small)
    with tempfile.TemporaryDirectory(prefix="graft-compress-") as scratch:
        save_adapter(Path(scratch) / "adapter", small, "")
        return load_adapter(Path(scratch) / "adapter")


def _compressed_before(store: Store, stored: StoredAdapter, recipe: Recipe) -> StoredAdapter | None:
    """Finds what the same recipe made of the same adapter: an interrupted run repeats nothing."""
    if stored.digest is None:
        return None
    wanted = recipe.model_dump(mode="json")
    for child in store.children(stored.digest, "compressed"):
        if child.record.recipe == wanted:
            return child
    return None


def _result(stored: StoredAdapter, original: Adapter, small: StoredAdapter) -> CompressResult:
    record = small.record
    bf16_bytes = 2 * sum(t.numel() for of in original.tensors.values() for t in of.values())
    num_bytes = sum(path.stat().st_size for path in small.path.iterdir())
    return CompressResult(
        digest=str(small.digest),
        parent=stored.digest,
        steps=tuple(record.parity[0].form.split("+")),
        r_before=getattr(original.method, "r", None),
        r_after=record.serving.r,
        bf16_bytes=bf16_bytes,
        num_bytes=num_bytes,
        bytes_fraction=num_bytes / bf16_bytes,
        parity=record.parity[0],
        metrics=record.metrics,
        parent_metrics=stored.record.metrics,
    )
