"""Plain text as token rows, outside any chat template: what forgetting is measured on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graft.core.errors import DataError
from graft.data.formats import load_examples
from graft.data.records import TokenRow

if TYPE_CHECKING:
    from graft.data.template import ChatTemplate


def load_text_rows(
    source: str, template: ChatTemplate, *, limit: int | None = None
) -> list[TokenRow]:
    """Reads rows of format `text`; every token but the first is supervised.

    Text that spells a control token is read as text.

    Args:
        source: A file, or `hub:<id>[:<split>]`.
        template: Its tokenizer and its context are used.
        limit: Read only the first so many rows.

    Raises:
        DataError: The source cannot be read, or a row is empty, one token long, or longer than the
            model's context.
    """
    examples = load_examples(source, "text", limit=limit)
    return [text_row(str(example.text), template, example.source) for example in examples]


def text_row(text: str, template: ChatTemplate, source: str) -> TokenRow:
    """Tokenizes one text as the model's tokenizer begins a document.

    Raises:
        DataError: Nothing could be predicted in it, or it exceeds the model's context.
    """
    ids = document_ids(text, template)
    if not 2 <= len(ids) <= template.context_tokens:
        raise DataError(
            f"{source}: the text has {len(ids)} tokens; 2 to {template.context_tokens} (the "
            "model's context) can be measured: split or lengthen it"
        )
    return TokenRow(ids, [False] + [True] * (len(ids) - 1), source)


def document_ids(text: str, template: ChatTemplate) -> list[int]:
    """Tokenizes one text as the model's tokenizer begins a document, of any length.

    Text that spells a control token is read as text.
    """
    ids: list[int] = template.tokenizer(text, split_special_tokens=True, verbose=False)["input_ids"]
    return ids
