"""What a token row must be before anything is spent on it: short enough, and with a right mask."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graft.core.errors import DataError
from graft.data.records import TokenRow

if TYPE_CHECKING:
    from graft.data.section import DataSection
    from graft.data.template import ChatTemplate


def fit_row(row: TokenRow, section: DataSection, template: ChatTemplate) -> TokenRow:
    """Returns the row itself where it is short enough, else refuses or cuts it.

    What counts is the prompt with the longest of its answers: each answer begins where the prompt
    ends. Cutting keeps the start of a plain row, and of each answer in a row with branches; the
    prompt of such a row stays whole.

    Raises:
        DataError: The row is too long, and is not to be cut or has no answer left then.
    """
    limit = min(section.max_length, template.context_tokens)
    length = max(len(row.branch_columns(k)) for k in range(1, row.num_branches + 1))
    if length <= limit:
        return row
    name = "the model's context" if limit == template.context_tokens else "data.max_length"
    if section.on_overflow == "refuse":
        longest = " with its longest answer" if row.num_branches > 1 else ""
        raising = (
            "raise data.max_length (up to the model's context), "
            if name == "data.max_length"
            else ""
        )
        raise DataError(
            f"{row.source}: the row has {length} tokens{longest}, and {name} is {limit}; shorten "
            f"or remove the row, {raising}or set data.on_overflow: truncate"
        )
    room = limit - row.num_prompt_tokens
    if room < 1:
        raise DataError(
            f"{row.source}: the prompt alone has {row.num_prompt_tokens} tokens, and {name} is "
            f"{limit}: no answer is left, and a prompt is never cut; shorten or remove the row"
        )
    kept = [*range(row.num_prompt_tokens)]
    for branch in range(1, row.num_branches + 1):
        own = row.branch_columns(branch)[row.num_prompt_tokens :]
        is_scored = row.branch and [at for at in own if row.is_supervised[at]] == own[-1:]
        # A score is read at the end, wherever that comes to be.
        if is_scored and 1 < room < len(own):
            own = own[: room - 1] + own[-1:]
        kept += own[:room]
    return row.take(kept)


def require_right_mask(row: TokenRow) -> None:
    """Refuses a row that teaches nothing.

    Raises:
        DataError: Nothing is supervised, or the first token is, or two branches are the same.
    """
    if row.asked is not None and len(row.input_ids) == row.num_prompt_tokens:
        return  # a prompt without a known answer: what is learned of it is sampled
    if not any(row.is_supervised):
        raise DataError(
            f"{row.source}: no token of the row is supervised, so it teaches nothing; if it was "
            "cut, raise data.max_length"
        )
    if row.is_supervised[0]:
        raise DataError(
            f"{row.source}: the mask is inverted: the first token is supervised, and nothing "
            "stands before it that could predict it"
        )
    branches = [
        tuple(row.take(row.branch_columns(k)).input_ids) for k in range(1, row.num_branches + 1)
    ]
    if row.num_prompt_tokens and len(set(branches)) < len(branches):
        raise DataError(
            f"{row.source}: two answers of the row are the same tokens, so neither can be "
            "preferred; if they were cut, raise data.max_length"
        )
