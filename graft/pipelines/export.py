"""`export`: an adapter as a folder that other programs load; it counts once it was read back."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from graft.artifacts import ParityReport, Store, StoredAdapter
from graft.core.errors import AdapterError, ConfigError, ModelError
from graft.core.files import fsync_folder
from graft.core.model import StrictModel
from graft.core.progress import QUIET, Progress

if TYPE_CHECKING:
    from graft.compressors.base import Adapter
    from graft.recipe.sections import Recipe


class ExportResult(StrictModel):
    """What was written."""

    path: str
    format: Literal["peft", "merged"]
    digest: str | None
    """Of the artifact that was exported."""
    num_bytes: int
    parity: ParityReport | None
    """Of a merged form, read back from disk; a PEFT form is compared bit by bit instead."""
    is_read_by_peft: bool | None = None
    """PEFT itself took every tensor of a LoRA up, on the base's shape; None where that was not
    tried: another form or method, or the base's `config.json` is not here."""


def export(
    reference: str,
    to: Path,
    *,
    home: Path,
    format: Literal["peft", "merged"] = "peft",
    recipe: Recipe | None = None,
    progress: Progress = QUIET,
) -> ExportResult:
    """Writes an adapter for other programs.

    Args:
        reference: A name, a digest, or an adapter folder.
        to: The folder to make.
        home: Where adapters and models are.
        format: `peft` is an adapter in plain PEFT form, numbers of compressed storage written out;
            `merged` is a whole model for transformers.
        recipe: Of the base, for `merged`; None is the adapter's own.
        progress: Told of every stage.

    Raises:
        AdapterError: The adapter is unknown or damaged, or has no such form, or `to` exists, or
            PEFT would leave tensors out.
        ConfigError: `to` cannot be written.
        GateRefusedError: The merged form says something else; nothing is left on disk.
    """
    from graft.compressors.folder import load_adapter
    from graft.engine.publish import require_answers

    stored = Store(home).resolve(reference, allow_folder=True)
    adapter = load_adapter(stored.path)
    if format == "merged":
        require_answers(stored, "export --format merged")
    if format == "peft" and adapter.method.artifact_kind == "full":
        raise AdapterError(
            f"{reference} is a whole model (method {adapter.method.type}), which has no PEFT form; "
            "use --format merged"
        )
    to = to.expanduser().absolute()
    parity, is_read_by_peft = None, None
    with _becoming(to) as temporary:
        if format == "peft":
            _write_peft(temporary, adapter, stored)
            is_read_by_peft = _is_read_by_peft(temporary, stored, home)
        else:
            parity = _write_merged(temporary, adapter, stored, home, recipe, progress)
    num_bytes = sum(path.stat().st_size for path in to.rglob("*") if path.is_file())
    return ExportResult(
        path=str(to),
        format=format,
        digest=stored.digest,
        num_bytes=num_bytes,
        parity=parity,
        is_read_by_peft=is_read_by_peft,
    )


@contextmanager
def _becoming(to: Path) -> Iterator[Path]:
    """Yields a path beside `to` that is renamed to it on success and removed on failure."""
    if to.exists() or to.is_symlink():
        raise AdapterError(f"--to {to} already exists; choose another folder")
    temporary = to.with_name(f".{to.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        temporary.rmdir()
    except OSError as error:
        raise ConfigError(
            f"cannot write to {to.parent}: {error.strerror or error}; choose another --to"
        ) from error
    try:
        yield temporary
        os.rename(temporary, to)
        fsync_folder(to.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_peft(folder: Path, adapter: Adapter, stored: StoredAdapter) -> None:
    import torch

    from graft.compressors.folder import load_adapter, save_adapter

    save_adapter(folder, adapter._replace(storage=None), stored.record.base_source)
    again = load_adapter(folder)
    for site, of_site in adapter.tensors.items():
        for key, value in of_site.items():
            if not torch.equal(again.tensors[site][key], value):
                raise AdapterError(f"{folder}: {site}.{key} was not written as it is; disk fault?")


def _is_read_by_peft(folder: Path, stored: StoredAdapter, home: Path) -> bool | None:
    """Has PEFT read a LoRA that answers, where the shape of its base is known; else None."""
    from graft.compressors.folder import CONFIG
    from graft.engine.memory.shape import ModelShape
    from graft.engine.peft_reading import require_taken_by_peft
    from graft.models import find_config
    from graft.pipelines.forms import recipe_of

    peft_type = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["peft_type"]
    if peft_type != "LORA" or stored.record.purpose != "answers":
        return None
    try:
        shape = ModelShape.of(find_config(recipe_of(stored).model, home))
    except (ConfigError, ModelError):  # a folder without a recipe, or a base that is elsewhere
        return None
    require_taken_by_peft(folder, shape)
    return True


def _write_merged(
    folder: Path,
    adapter: Adapter,
    stored: StoredAdapter,
    home: Path,
    recipe: Recipe | None,
    progress: Progress,
) -> ParityReport:
    from graft.engine.merge import merge_into_base, save_merged
    from graft.engine.multi import MultiAdapterModel
    from graft.engine.parity import require_parity
    from graft.engine.publish import require_base
    from graft.engine.run import load_run
    from graft.models import load_model
    from graft.pipelines.forms import compare_with_adapter, form_name, recipe_of

    recipe = recipe or recipe_of(stored)
    run = load_run(recipe, home)
    require_base(stored, run.ready, run.recipe.model)
    progress.note("export: merging into the base")
    save_merged(folder, merge_into_base(load_model(run.ready, recipe.model), adapter), run.ready)
    again = load_model(run.ready.model_copy(update={"path": folder}), recipe.model)
    report = compare_with_adapter(
        run, adapter, form_name(stored), MultiAdapterModel(again), recipe, progress
    )
    require_parity(report)
    return report
