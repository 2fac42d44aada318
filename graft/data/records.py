"""The records that data becomes on its way to the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from graft.core.model import Listed, StrictModel


class Message(StrictModel):
    """One turn."""

    role: str
    content: str


class Example(StrictModel):
    """One row of any format, normalised. Exactly one of the five shapes is filled."""

    source: str
    """File and line, `train.jsonl:7`, for error messages."""
    messages: Listed[Message] = ()
    """A conversation; the assistant's turns are learned."""
    prompt: Listed[Message] = ()
    """Preference and unpaired rows: what the answers reply to. Alone: a prompt to be answered."""
    chosen: str | None = None
    rejected: str | None = None
    answer: str | None = None
    """Unpaired rows: an answer of which only this is known."""
    is_wanted: bool | None = None
    text: str | None = None
    """Plain text for continued pre-training."""


class EvalPrompt(NamedTuple):
    """One row for generation: the prompt up to the assistant, and the answer."""

    prompt_ids: list[int]
    reference: str
    """The wanted answer; empty where none is known."""
    source: str
    messages: list[dict[str, Any]]
    """The prompt as OpenAI messages."""
    part: str = ""
    """As in `TokenRow`."""


class TokenRow(NamedTuple):
    """One row as the engine sees it; lists of tokens have the same length, no padding.

    A row may branch: several answers to one prompt stand in it behind each other, and each sees
    the prompt and itself alone. One data example is one row, so that a pair is never torn apart.
    """

    input_ids: list[int]
    is_supervised: list[bool]
    """True where the token is a target of the loss (predicted from the tokens before it)."""
    source: str
    branch: list[int] | None = None
    """Branch of each token: 0s for the shared prompt, then 1s for the first answer, 2s for the
    second, ...; None for a row that does not branch. Without 0s they are texts that do not see
    each other."""
    label: float | None = None
    """What is known of the whole answer: 1 wanted, 0 unwanted."""
    extra: dict[str, Sequence[float]] | None = None
    """Numbers for the objective, one for each of the row's targets in order."""
    part: str = ""
    """Source of a mixture that it is from; empty where there is one source alone."""
    asked: EvalPrompt | None = None
    """What is asked, where training samples the answers; the row's own is what was wanted."""

    @property
    def num_branches(self) -> int:
        """Answers in the row; 1 where it does not branch."""
        return max(self.branch[-1], 1) if self.branch else 1

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens that all branches share; 0 where the row does not branch."""
        return self.branch.count(0) if self.branch else 0

    @property
    def targets(self) -> list[int]:
        """Columns of the supervised tokens that have one before them to predict them."""
        starts = {0}
        if self.branch and not self.num_prompt_tokens:
            starts = {self.branch.index(k) for k in range(1, self.num_branches + 1)}
        found = enumerate(self.is_supervised)
        return [at for at, is_target in found if is_target and at not in starts]

    def branch_columns(self, branch: int) -> list[int]:
        """Columns of the prompt and of one answer."""
        if self.branch is None:
            return list(range(len(self.input_ids)))
        return [at for at, of in enumerate(self.branch) if of in (0, branch)]

    def take(self, columns: list[int]) -> TokenRow:
        """Returns the row with these columns only; what stands beside targets is left behind."""
        return self._replace(
            input_ids=[self.input_ids[at] for at in columns],
            is_supervised=[self.is_supervised[at] for at in columns],
            branch=[self.branch[at] for at in columns] if self.branch else None,
            extra=None,
        )
