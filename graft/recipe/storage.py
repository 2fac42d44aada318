"""The URL of a study's database, as a recipe may hold it."""

from __future__ import annotations

from urllib.parse import parse_qsl, urlsplit

from graft.core.passwords import mask_passwords

_FORM = "write postgresql://USER@HOST:PORT/DATABASE"


def require_database_url(url: str) -> str:
    """Refuses what names no PostgreSQL database, or holds a password.

    Raises:
        ValueError: In words that do not repeat the password.
    """
    shown = mask_passwords(url)
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:  # its own words would quote what stands after the colon
        raise ValueError(f"{shown!r} is no URL: its port is no number; {_FORM}") from None
    if parts.scheme not in ("postgresql", "postgres"):
        raise ValueError(
            f"{shown!r} is no PostgreSQL database; {_FORM}, or leave it out for a journal file in "
            "the study's folder"
        )
    in_query = any(key.endswith("password") for key, _ in parse_qsl(parts.query))
    if parts.password is not None or in_query:
        raise ValueError(
            f"{shown!r} holds a password, and a recipe is kept with its study; take it out and "
            "name the environment variable that holds it in search.storage_password_env, or leave "
            "it to PGPASSWORD or ~/.pgpass"
        )
    if not parts.path.strip("/"):
        raise ValueError(f"{shown!r} names no database; {_FORM}")
    return url
