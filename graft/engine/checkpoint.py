"""Checkpoints: whole tensors in safetensors, a manifest, nothing about world size or ZeRO stage."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from graft.core.errors import TrainingError
from graft.core.files import folder_atomic, sha256_file, write_json
from graft.engine.train import SlotState
from graft.methods.base import by_site

_FORMAT = 1
_KEEP = 2
_MEMORY = "method.safetensors"
_ROLLOUT = "rollout.safetensors"

_log = logging.getLogger(__name__)


def save_checkpoint(root: Path, state: SlotState, facts: dict[str, Any]) -> Path:
    """Writes `root/step-<n>` atomically and removes all but the newest two.

    Args:
        root: The run's checkpoint folder.
        state: What to save.
        facts: JSON that must match on resume (recipe digest, base digest) and anything worth
        keeping.
    """
    from safetensors.torch import save_file

    folder = root / f"step-{state.step:08d}"
    if folder.exists():
        if _problem(folder) is None:
            return folder
        shutil.rmtree(folder)
    with folder_atomic(folder) as temporary:
        flat = {
            f"{s}.{k}": v.contiguous() for s, of in state.tensors.items() for k, v in of.items()
        }
        save_file(flat, temporary / "adapter.safetensors")
        moments = {
            f"{key}|{name}": value.contiguous()
            for key, of in state.optimizer.items()
            for name, value in of.items()
        }
        save_file(moments, temporary / "optimizer.safetensors")
        save_file({k: v.contiguous() for k, v in state.memory.items()}, temporary / _MEMORY)
        if state.rollout:
            save_file({k: v.contiguous() for k, v in state.rollout.items()}, temporary / _ROLLOUT)
        digests = {f.name: sha256_file(f) for f in sorted(temporary.iterdir())}
        manifest = {"format": _FORMAT, "step": state.step, "facts": facts, "files": digests}
        write_json(temporary / "manifest.json", manifest)
    for old in sorted(root.glob("step-*"))[:-_KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def _problem(folder: Path) -> str | None:
    """Returns what is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest["format"] != _FORMAT:
            return f"format {manifest['format']}, this version reads {_FORMAT}"
        for name, digest in manifest["files"].items():
            if sha256_file(folder / name) != digest:
                return f"{name} does not match its digest"
    except (OSError, ValueError, KeyError) as error:
        return f"unreadable: {error}"
    return None


def load_checkpoint(folder: Path) -> tuple[SlotState, dict[str, Any]]:
    """Reads one checkpoint and its facts.

    Raises:
        TrainingError: It is damaged, or of a format that this version does not know.
    """
    from safetensors.torch import load_file

    problem = _problem(folder)
    if problem is not None:
        raise TrainingError(f"checkpoint {folder}: {problem}; remove it to use an older one")
    manifest = json.loads((folder / "manifest.json").read_text())
    tensors = by_site(load_file(folder / "adapter.safetensors"))
    optimizer: dict[str, dict[str, Any]] = {}
    for key, value in load_file(folder / "optimizer.safetensors").items():
        parameter, _, name = key.partition("|")
        optimizer.setdefault(parameter, {})[name] = value
    memory, rollout = (
        load_file(folder / name) if (folder / name).exists() else {} for name in (_MEMORY, _ROLLOUT)
    )
    return SlotState(manifest["step"], tensors, optimizer, memory, rollout), manifest["facts"]


def newest_checkpoint(root: Path) -> tuple[SlotState, dict[str, Any]] | None:
    """Reads the newest checkpoint that is whole; damaged ones are passed over with a warning."""
    for folder in sorted(root.glob("step-*"), reverse=True):
        problem = _problem(folder)
        if problem is None:
            return load_checkpoint(folder)
        _log.warning("passing over checkpoint %s: %s", folder, problem)
    return None
