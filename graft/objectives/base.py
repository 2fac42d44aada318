"""What an objective is: how a data row becomes token rows, what it needs, and its loss.

The engine counts, forwards and steps. An objective turns examples into rows, and what the model
makes of their supervised tokens into a loss sum a row; the step's loss is the sum of these over the
sum of the rows' weights in the whole step, however it is split into micro-batches and workers.

The hooks, in the order in which they are called, each in the process that trains:

1. Before training: `rows` for every example, then `pack` and `require_rows` once on all training
   rows.
2. A step takes its rows. Where `needs` has `reference`, each gets `extra["reference_logprobs"]`.
3. `probe_rows` on all rows of the step, by every worker alike. What it returns is scored without
   gradient and without dropout, under the weights of this step and under the reference, and given
   to `statistics`.
4. `row_weight` for every row of the step; then, for every micro-batch that has rows of the slot,
   `loss` and its backward pass, and `figures`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from graft.core.model import Variant
from graft.core.registry import Registry
from graft.core.spaces import Space

if TYPE_CHECKING:
    import torch

    from graft.data.records import Example, TokenRow
    from graft.data.template import ChatTemplate

DETAILS = "rollout/"
"""What a step tells of its rollout under names that begin so is for reports, not for progress."""
ROLLOUT_SECONDS = DETAILS + "seconds"
"""What a step tells of its rollout's time; reports have the share of all steps' time."""
REFERENCE = "reference_logprobs"
"""Name in `extra` of the log-probabilities under the reference."""


@dataclass(frozen=True)
class TokenOutputs:
    """What the model makes of one slot's rows in a micro-batch.

    A *position* (P) is a supervised token. Those of a row stand together, in the row's own order,
    and are the same whether branches share their prompt's forward pass or not.
    """

    rows: tuple[TokenRow, ...]
    """The rows, for their labels."""
    logprobs_P: torch.Tensor
    """Log-probability of each supervised token, fp32 or fp64; the loss's gradient flows here."""
    row_P: torch.Tensor
    """Which of `rows` it belongs to, ascending, int64."""
    branch_P: torch.Tensor
    """Branch that it belongs to, int64: 0 in the prompt or in a row that does not branch."""
    extra: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """What all of the rows carry beside their positions, each `[positions]`, without gradient."""
    values_P: torch.Tensor | None = None
    """Value of the state that predicts each token; None without `values` in `needs`."""
    entropy_P: torch.Tensor | None = None
    """Entropy of each token's distribution, nats; None without `entropy` in `needs`."""
    statistics: Mapping[str, float] = field(default_factory=dict)
    """What `statistics` made of the whole step."""

    @property
    def num_rows(self) -> int:
        """Rows, with or without positions."""
        return len(self.rows)

    @property
    def reference_P(self) -> torch.Tensor:
        """Log-probability of each token under the reference."""
        return self.extra[REFERENCE]

    @property
    def labels(self) -> torch.Tensor:
        """Label of each row, `[num_rows]`; NaN where it has none."""
        known = [float("nan") if row.label is None else row.label for row in self.rows]
        return self.logprobs_P.new_tensor(known)

    def row_sums(self, values_P: torch.Tensor) -> torch.Tensor:
        """Sums over each row's positions, `[num_rows]`."""
        return values_P.new_zeros(self.num_rows).index_add(0, self.row_P, values_P)

    def branch_sums(self, values_P: torch.Tensor, num_branches: int) -> torch.Tensor:
        """Sums over each branch's positions, `[num_rows, num_branches]`; branch 1 comes first.

        The prompt's own positions are in none of them.
        """
        sums = values_P.new_zeros(self.num_rows * (num_branches + 1))
        sums = sums.index_add(0, self.row_P * (num_branches + 1) + self.branch_P, values_P)
        return sums.reshape(self.num_rows, num_branches + 1)[:, 1:]


class Objective(Variant):
    """Base of all objectives; stateless, and no hook may change what it is given."""

    columns: ClassVar[frozenset[str]] = frozenset()
    """Kinds of `Example` it can learn from: `messages`, `preference`, `unpaired`, `prompts`,
    `text`."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """What the engine must compute beside log-probabilities: `reference`, `values`, `entropy`,
    `rollouts`."""
    scores_answers: ClassVar[bool] = False
    """What it trains is a reward model, published with its head; it gives no answers."""
    row_fields: ClassVar[frozenset[str] | None] = None
    """Settings that shape token rows; objectives alike in them share theirs. None is all."""
    smallest_batch: ClassVar[int] = 1
    """Rows that a step must have at least."""

    @property
    def row_key(self) -> str:
        """Names what token rows depend on."""
        shaping = None if self.row_fields is None else {"type", *self.row_fields}
        return self.model_dump_json(include=shaping)

    @classmethod
    def search_space(cls) -> dict[str, Space]:
        """What its authors would search: field path (`objective.beta`, `train.lr`) → range."""
        return {}

    @abstractmethod
    def rows(self, example: Example, template: ChatTemplate) -> list[TokenRow]:
        """Turns one example into token rows with their supervised positions marked."""

    def pack(self, rows: list[TokenRow], max_length: int) -> list[TokenRow]:
        """Puts training rows together into longer ones, or cuts them; called once on all of them.

        Held-out rows are given one by one: cut alike, and never put together.
        What is still longer than `max_length` is then refused or cut as `data.on_overflow` says.
        """
        return rows

    def require_rows(self, rows: list[TokenRow], source: str) -> None:
        """Refuses training rows that are right one by one and teach nothing together.

        Called once, on all of them as they will be trained on.

        Args:
            rows: All training rows.
            source: `data.train`, for the message.

        Raises:
            DataError: Nothing can be learned from them.
        """

    @abstractmethod
    def row_weight(self, row: TokenRow) -> float:
        """Returns what a row adds to the denominator of the step's loss: its tokens, or 1."""

    def probe_rows(self, rows: list[TokenRow]) -> list[TokenRow]:
        """Returns rows whose log-probabilities `statistics` needs; by default none.

        What is longer than the base's context loses its end.

        Args:
            rows: All rows of the step, of all micro-batches and workers, in the step's order.
        """
        return []

    def statistics(self, probes: TokenOutputs) -> dict[str, float]:
        """Sums up the whole step before its gradient pass; called where there are probe rows.

        Args:
            probes: All probe rows at once, in double precision, without gradient.
        """
        return {}

    @abstractmethod
    def loss(self, outputs: TokenOutputs) -> torch.Tensor:
        """Returns each row's summed loss, `[num_rows]`.

        It may depend on other rows through `outputs.statistics` alone: rows meet in a micro-batch
        by chance.
        """

    def figures(self, outputs: TokenOutputs) -> dict[str, torch.Tensor]:
        """Tells how training goes, without gradient: name → a number a row, `[num_rows]`.

        The engine averages each over all rows of the step for which it is not NaN; they stand as
        `objective/<name>` in progress, events and reports. The names are always the same ones.
        """
        return {}

    def collapse(self, figures: Mapping[str, float]) -> str | None:
        """Says why training should end here, from what a step reported; by default never.

        Called after every step. The words complete "step 7: ".

        Args:
            figures: As they were averaged.
        """
        return None


OBJECTIVES: Registry[Objective] = Registry("objective", "graft.objectives")
