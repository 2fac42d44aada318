"""Settings of a recipe as the command line takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def settings_in_words(settings: Mapping[str, Any]) -> str:
    """Formats paths and values as `--set` takes them.

    >>> settings_in_words({"scale.zero_stage": 3, "scale.gradient_checkpointing": True})
    '--set scale.zero_stage=3 --set scale.gradient_checkpointing=true'
    """
    return " ".join(f"--set {_quoted(f'{k}={_plain(v)}')}" for k, v in settings.items())


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_plain(of_key)}" for key, of_key in value.items()) + "}"
    return str(value)


def _quoted(text: str) -> str:
    return f"'{text}'" if " " in text or "{" in text else text
