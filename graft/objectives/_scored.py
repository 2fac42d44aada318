"""Rows whose answers are scored: a reward model reads the state of each answer's last token."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from graft.data.records import TokenRow


def scored_row(row: TokenRow) -> TokenRow:
    """Puts one more token behind each answer; it alone is a target.

    The state that predicts it is that of the answer's last token, its end of turn. Which token it
    is does not matter: nothing sees it.

    Args:
        row: A prompt and its answers, as `ChatTemplate.answers` makes it.
    """
    num_prompt = row.num_prompt_tokens
    ids, branch = row.input_ids[:num_prompt], [0] * num_prompt
    is_supervised = [False] * num_prompt
    for number in range(1, row.num_branches + 1):
        own = [row.input_ids[at] for at in row.branch_columns(number)[num_prompt:]]
        ids = ids + own + own[-1:]
        branch += [number] * (len(own) + 1)
        is_supervised += [False] * len(own) + [True]
    return row._replace(input_ids=ids, is_supervised=is_supervised, branch=branch)
