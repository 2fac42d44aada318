"""The reference of a drift watch: what training prompts are about, as the replicas see prompts."""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from graft.core.errors import DataError
from graft.core.files import write_atomic
from graft.core.seeds import derive_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from graft.data import Example
    from graft.engine.multi import MultiAdapterModel
    from graft.recipe.operation import WatchSection


def prompt_text(example: Example) -> str | None:
    """Returns the last thing that the user says before the last answer; None for plain text."""
    turns = example.prompt or example.messages
    said = [turn.content for turn in turns if turn.role == "user"]
    return said[-1] if said else None


def choose_prompts(examples: Sequence[Example], watch: WatchSection) -> list[str]:
    """Draws `watch.reference_rows` prompts, seeded; all of them where there are no more.

    Raises:
        DataError: No row has a prompt.
    """
    texts = [text for example in examples if (text := prompt_text(example)) is not None]
    if not texts:
        raise DataError(
            "the training rows have no prompts (plain text), so there is nothing to compare served "
            "prompts with; watch drift with conversations or preference rows"
        )
    random.Random(derive_seed("reference", watch.seed)).shuffle(texts)
    return texts[: watch.reference_rows]


def save_reference(
    path: Path, model: MultiAdapterModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]
) -> None:
    """Embeds prompts exactly as the replicas do, and writes them as `x_ref` of an npz file."""
    from graft.engine.embed import embed_texts

    content = io.BytesIO()
    np.savez(content, x_ref=embed_texts(model, tokenizer, texts))
    write_atomic(path, content.getvalue())
