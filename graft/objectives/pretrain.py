"""Continued pre-training: next-token cross-entropy on plain text, documents packed into rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from graft.core.errors import ConfigError, DataError
from graft.core.registry import nearest
from graft.data.plain_text import document_ids
from graft.objectives._packing import pack_documents
from graft.objectives.base import OBJECTIVES, Objective, TokenOutputs

if TYPE_CHECKING:
    import torch

    from graft.data.records import Example, TokenRow
    from graft.data.template import ChatTemplate


@OBJECTIVES.register
class PretrainObjective(Objective):
    """Mean cross-entropy over every token of plain text but the first of each document.

    For a domain's language or its facts, before or instead of answers. A row of a step is up to
    `data.max_length` tokens of whole documents; none of them sees another, so that each has the
    loss that it would have alone. Longer documents are cut. Held-out documents stay apart.

    Reference:
        Don't Stop Pretraining: Adapt Language Models to Domains and Tasks, arXiv 2004.10964.
    """

    type: Literal["pretrain"] = "pretrain"
    end_token: str | None = None
    """Token put after each document; None: the tokenizer's own end of a sequence."""

    columns: ClassVar[frozenset[str]] = frozenset({"text"})

    def rows(self, example: Example, template: ChatTemplate) -> list[TokenRow]:
        """Tokenizes one document, of any length, with its end.

        Raises:
            DataError: The row is no plain text.
            ConfigError: The tokenizer does not know the token that ends a document.
        """
        from graft.data.records import TokenRow

        if example.text is None:
            raise DataError(
                f"{example.source}: objective 'pretrain' learns from plain text, and this row has "
                "none; give rows with `text`, or use objective sft for conversations"
            )
        ids = document_ids(example.text, template)
        end = self._end_id(template)
        ids += [] if ids[-1:] == [end] else [end]
        return [TokenRow(ids, [False] + [True] * (len(ids) - 1), example.source)]

    def pack(self, rows: list[TokenRow], max_length: int) -> list[TokenRow]:
        """Puts documents together into full rows; longer ones are cut."""
        return pack_documents(rows, max_length)

    def _end_id(self, template: ChatTemplate) -> int:
        tokenizer = template.tokenizer
        token = self.end_token or tokenizer.eos_token
        if token is None:
            raise ConfigError(
                "the model's tokenizer has no token that ends a sequence; name the one that ends "
                "its documents as objective.end_token"
            )
        index: int | None = tokenizer.convert_tokens_to_ids(token)
        if index is None or tokenizer.convert_ids_to_tokens(index) != token:
            known = list(tokenizer.all_special_tokens)
            raise ConfigError(
                f"objective.end_token {token!r} is no token of the model's."
                f"{nearest(token, known)} Its control tokens: {', '.join(known)}"
            )
        return index

    def row_weight(self, row: TokenRow) -> float:
        """Counts the supervised tokens."""
        return float(sum(row.is_supervised))

    def loss(self, outputs: TokenOutputs) -> torch.Tensor:
        """Sums the negative log-likelihood of each row's supervised tokens."""
        return -outputs.row_sums(outputs.logprobs_P)
