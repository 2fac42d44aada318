"""The recipe's `data` section."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from graft.core.model import StrictModel


class DataSection(StrictModel):
    """Where training and held-out rows come from, and how they are read."""

    train: str
    """A file (.jsonl, .json, .csv, .parquet), or `hub:<dataset id>[:<split>]`."""
    eval: str | None = None
    """Held-out rows, same forms. Without it, metrics on held-out rows cannot be asked for."""
    format: Literal[
        "auto",
        "messages",
        "alpaca",
        "sharegpt",
        "prompt_completion",
        "preference",
        "unpaired",
        "prompts",
        "text",
    ] = "auto"
    """The rows' shape; `auto` recognises it from the first row's keys and says so."""
    max_length: int = Field(1024, ge=8)
    """Longest row in tokens, template included."""
    on_overflow: Literal["refuse", "truncate"] = "refuse"
    """What to do with a longer row; truncation keeps the start and is counted in the proof."""
    system: str | None = None
    """A system message put before rows that have none."""
    limit: int | None = Field(None, ge=1)
    """Use only the first so many training rows."""
    eval_limit: int | None = Field(None, ge=1)
    """Use only the first so many held-out rows."""
