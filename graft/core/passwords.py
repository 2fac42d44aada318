"""Masks passwords in URLs, before a text is shown or kept."""

from __future__ import annotations

import re

_IN_URL = re.compile(r"([a-z][a-z0-9+.-]*://[^\s/?#:@]*:)[^\s'\"]*(?=@)", re.IGNORECASE)
"""Up to the last @ of the word: a password may hold what should have been encoded."""
_IN_QUERY = re.compile(r"([?&][a-z_]*password=)[^\s&'\"]*", re.IGNORECASE)


def mask_passwords(text: str) -> str:
    """Puts `***` for the password of every URL in a text.

    >>> mask_passwords("postgresql://ann:secret@db.example/studies is away")
    'postgresql://ann:***@db.example/studies is away'
    """
    return _IN_QUERY.sub(r"\1***", _IN_URL.sub(r"\1***", text))
