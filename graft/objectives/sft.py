"""Supervised fine-tuning: next-token cross-entropy on the answer's tokens only."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from graft.core.errors import DataError
from graft.objectives.base import OBJECTIVES, Objective, TokenOutputs

if TYPE_CHECKING:
    import torch

    from graft.data.records import Example, TokenRow
    from graft.data.template import ChatTemplate


@OBJECTIVES.register
class SftObjective(Objective):
    """Mean cross-entropy over the assistant's tokens, its end-of-turn token included.

    Reference:
        Training language models to follow instructions with human feedback, arXiv 2203.02155,
        section 3.
    """

    type: Literal["sft"] = "sft"

    columns: ClassVar[frozenset[str]] = frozenset({"messages"})

    def rows(self, example: Example, template: ChatTemplate) -> list[TokenRow]:
        """Renders the conversation with the model's own template; one row an example.

        Raises:
            DataError: The row is not a conversation.
        """
        if not example.messages:
            raise DataError(
                f"{example.source}: objective 'sft' learns from conversations, "
                "and this row has none; "
                "use one of the formats messages, alpaca, sharegpt, prompt_completion"
            )
        return [template.tokens(example.messages, source=example.source)]

    def row_weight(self, row: TokenRow) -> float:
        """Counts the supervised tokens."""
        return float(sum(row.is_supervised))

    def loss(self, outputs: TokenOutputs) -> torch.Tensor:
        """Sums the negative log-likelihood of each row's supervised tokens."""
        return -outputs.row_sums(outputs.logprobs_P)
