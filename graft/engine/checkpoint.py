"""Checkpoints: whole tensors in safetensors, a manifest, nothing about world size or ZeRO stage.

A checkpoint is a folder `step-<n>` that is there as a whole or not at all. Three are kept: the
newest, the one before it in case the newest is damaged, and the best where something is searched.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

from graft.core.errors import NoRoomError, TrainingError
from graft.core.files import (
    folder_atomic,
    is_disk_full,
    remove_folder,
    remove_leftovers,
    sha256_file,
    write_json,
)
from graft.engine.loss_scale import LossScaleState
from graft.engine.train import SlotState
from graft.methods.base import by_site

_FORMAT = 1
_NEWEST = 2
_MANIFEST = "manifest.json"
_ADAPTER = "adapter.safetensors"
_OPTIMIZER = "optimizer.safetensors"
_MEMORY = "method.safetensors"
_ROLLOUT = "rollout.safetensors"

_log = logging.getLogger(__name__)


def save_checkpoint(
    root: Path, state: SlotState, facts: dict[str, Any], *, score: float | None = None
) -> Path:
    """Writes `root/step-<n>` atomically, then removes those that are no longer needed.

    Args:
        root: The run's checkpoint folder.
        state: What to save.
        facts: JSON that must match on resume (recipe digest, base digest) and anything worth
        keeping.
        score: How good it is, more is better; the best one stays. None where nothing says so.

    Raises:
        TrainingError: It could not be written; older ones stand. A `NoRoomError` where the disk is
            full.
    """
    from safetensors import SafetensorError

    folder = _folder(root, state.step)
    if folder.exists() and _problem(folder) is None:
        return folder
    try:
        remove_folder(folder)
        remove_leftovers(root)
        with folder_atomic(folder) as temporary:
            _write(temporary, state, facts, score)
    except (OSError, SafetensorError) as error:
        kind = NoRoomError if is_disk_full(error) else TrainingError
        raise kind(
            f"cannot write checkpoint {folder}: {error}{_room(root)}; older checkpoints stand: "
            "make room there and run the same command again"
        ) from error
    _remove_unneeded(root, state.step)
    return folder


def _write(folder: Path, state: SlotState, facts: dict[str, Any], score: float | None) -> None:
    from safetensors.torch import save_file

    moments = {f"{key}|{name}": v for key, of in state.optimizer.items() for name, v in of.items()}
    tensors = {f"{site}.{key}": v for site, of in state.tensors.items() for key, v in of.items()}
    files = {_ADAPTER: tensors, _OPTIMIZER: moments, _MEMORY: state.memory}
    if state.rollout:
        files[_ROLLOUT] = state.rollout
    for name, content in files.items():
        save_file({key: value.contiguous() for key, value in content.items()}, folder / name)
    manifest = {
        "format": _FORMAT,
        "step": state.step,
        "score": score,
        "loss_scale": state.loss_scale,
        "facts": facts,
        "files": {name: sha256_file(folder / name) for name in files},
    }
    write_json(folder / _MANIFEST, manifest)


def _room(root: Path) -> str:
    try:
        return f" ({shutil.disk_usage(root).free / 1e6:.0f} MB are free)"
    except OSError:
        return ""


def _remove_unneeded(root: Path, step: int) -> None:
    """Keeps the newest up to `step` and the best; what lies past it was damaged and passed over."""
    past = _folder(root, step)
    found = _folders(root)
    kept = [folder for folder in found if folder.name <= past.name][-_NEWEST:]
    scores = {folder: score for folder in found if (score := _score(folder)) is not None}
    if scores:
        kept.append(max(scores, key=lambda folder: (scores[folder], folder.name)))
    for folder in found:
        if folder not in kept:
            remove_folder(folder)


def _score(folder: Path) -> float | None:
    try:
        score = _read_manifest(folder).get("score")
    except (OSError, ValueError):
        return None
    return score if isinstance(score, float) and math.isfinite(score) else None


def _folder(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def _folders(root: Path) -> list[Path]:
    """Returns the checkpoints from the oldest to the newest."""
    return sorted(root.glob("step-*"))


def _read_manifest(folder: Path) -> dict[str, Any]:
    manifest = json.loads((folder / _MANIFEST).read_text())
    if not isinstance(manifest, dict):
        raise ValueError(f"{_MANIFEST} is not an object")
    return manifest


def _problem(folder: Path) -> str | None:
    """Returns what is damaged in a checkpoint, or None.

    Raises:
        TrainingError: Nothing is, but a newer version wrote it.
    """
    try:
        manifest = _read_manifest(folder)
        if manifest["format"] > _FORMAT:
            raise TrainingError(
                f"checkpoint {folder} has format {manifest['format']}, this version of graft reads "
                f"up to {_FORMAT}; go on with the version that wrote it, or give this run another "
                "name"
            )
        if _folder(folder.parent, manifest["step"]) != folder:
            return f"its manifest is of step {manifest['step']}"
        digests = manifest["files"]
        for name in {_ADAPTER, _OPTIMIZER, _MEMORY} | digests.keys():
            if sha256_file(folder / name) != digests[name]:
                return f"{name} does not match its digest: it is truncated or was changed"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"unreadable: {error}"
    return None


def load_checkpoint(folder: Path) -> tuple[SlotState, dict[str, Any]]:
    """Reads one checkpoint and its facts.

    Raises:
        TrainingError: It is damaged, or of a format that this version does not know.
    """
    problem = _problem(folder)
    if problem is not None:
        raise TrainingError(f"checkpoint {folder}: {problem}; remove it to use an older one")
    return _read(folder)


def _read(folder: Path) -> tuple[SlotState, dict[str, Any]]:
    from safetensors.torch import load_file

    manifest = _read_manifest(folder)
    tensors = by_site(load_file(folder / _ADAPTER))
    optimizer: dict[str, dict[str, Any]] = {}
    for key, value in load_file(folder / _OPTIMIZER).items():
        parameter, _, name = key.partition("|")
        optimizer.setdefault(parameter, {})[name] = value
    memory = load_file(folder / _MEMORY)
    rollout = load_file(folder / _ROLLOUT) if _ROLLOUT in manifest["files"] else {}
    scale = manifest.get("loss_scale")  # absent from older ones
    state = SlotState(
        manifest["step"],
        tensors,
        optimizer,
        memory,
        rollout,
        LossScaleState(*scale) if scale else None,
    )
    return state, manifest["facts"]


def newest_checkpoint(root: Path) -> tuple[SlotState, dict[str, Any]] | None:
    """Reads the newest checkpoint that is whole; damaged ones are passed over with a warning.

    Returns:
        The checkpoint and its facts, or None where there never was one.

    Raises:
        TrainingError: There are some and all are damaged, or one is of a newer format.
    """
    problems = {}
    for folder in reversed(_folders(root)):
        problem = _problem(folder)
        if problem is None:
            return _read(folder)
        _log.warning("passing over checkpoint %s: %s", folder, problem)
        problems[folder.name] = problem
    if problems:
        listed = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
        raise TrainingError(
            f"no checkpoint in {root} is whole ({listed}); restore one from a copy, or remove that "
            "folder to train from the start"
        )
    return None


def newest_step(root: Path) -> int:
    """Returns the step of the newest checkpoint, whole or not; 0 where there is none."""
    return max((int(folder.name.removeprefix("step-")) for folder in _folders(root)), default=0)
