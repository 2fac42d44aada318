"""Reward models: a number for an answer, learned from which of two answers people preferred."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from graft.core.spaces import Float, Space
from graft.objectives.base import OBJECTIVES, Objective, TokenOutputs

if TYPE_CHECKING:
    import torch

    from graft.data.records import Example, TokenRow
    from graft.data.template import ChatTemplate


@OBJECTIVES.register
class RewardObjective(Objective):
    """Scores the chosen answer above the rejected one: Bradley-Terry, by a linear head.

    For pairs of answers to one prompt. What comes out gives answers a score, from the state of
    their last token, and none of its own: it is a reward of `ppo` and `grpo` (`reward_model`). Its
    adapter is PEFT's of a sequence classifier with one output, the head in it. `eval/loss` is the
    loss of a held-out pair, and `eval/preference_accuracy` the share of pairs scored rightly.

    Reference:
        Training language models to follow instructions with human feedback, arXiv 2203.02155
        (section 3.5); centred scores: Helping or Herding?, arXiv 2312.09244 (section 2).
    """

    type: Literal["reward"] = "reward"
    margin: float = Field(0.0, ge=0)
    """By how much the chosen answer's score is to exceed the other's."""
    center_rewards_coefficient: float | None = Field(None, gt=0)
    """Weight of the squared sum of a pair's scores, which draws scores towards 0; 0.01 is usual."""

    columns: ClassVar[frozenset[str]] = frozenset({"preference"})
    row_fields: ClassVar[frozenset[str] | None] = frozenset()
    needs: ClassVar[frozenset[str]] = frozenset({"values"})
    scores_answers: ClassVar[bool] = True

    @classmethod
    def search_space(cls) -> dict[str, Space]:
        """The learning rate alone: a head and an adapter start from nothing."""
        return {"train.lr": Float(low=1e-5, high=1e-3, log=True)}

    def rows(self, example: Example, template: ChatTemplate) -> list[TokenRow]:
        """Puts both answers behind their prompt, each with a token whose state is scored.

        Raises:
            DataError: The example is no pair.
        """
        from graft.objectives._preference import pair_row
        from graft.objectives._scored import scored_row

        return [scored_row(pair_row(example, template, self.type))]

    def row_weight(self, row: TokenRow) -> float:
        """Counts pairs."""
        return 1.0

    def loss(self, outputs: TokenOutputs) -> torch.Tensor:
        """Returns each pair's loss."""
        from torch.nn.functional import logsigmoid

        chosen, rejected = self._scores(outputs).unbind(1)
        losses: torch.Tensor = -logsigmoid(chosen - rejected - self.margin)
        if self.center_rewards_coefficient is not None:
            losses = losses + self.center_rewards_coefficient * (chosen + rejected).square()
        return losses

    def figures(self, outputs: TokenOutputs) -> dict[str, torch.Tensor]:
        """The scores, their margin, and how often the chosen answer has the higher one."""
        from graft.objectives._preference import pair_figures

        return pair_figures(self._scores(outputs))

    def _scores(self, outputs: TokenOutputs) -> torch.Tensor:
        assert outputs.values_P is not None  # `needs` has them
        return outputs.branch_sums(outputs.values_P, 2)
