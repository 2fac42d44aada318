"""Odds-ratio preference optimisation: one answer learned, the other unlearned, in one pass."""

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
class OrpoObjective(Objective):
    """Cross-entropy of the chosen answer, and `beta` times the odds of it over the rejected one.

    For pairs of answers to one prompt, from the base on: it needs no fine-tuning before it and no
    reference. Likelihoods are means over an answer's tokens; every pair counts alike.

    Reference:
        ORPO: Monolithic Preference Optimization without Reference Model, arXiv 2403.07691.
    """

    type: Literal["orpo"] = "orpo"
    beta: float = Field(0.1, gt=0)
    """Weight of the odds ratio; the paper's λ."""
    learns_prompt: bool = False
    """The prompt's tokens are in the cross-entropy too, as in the authors' own code."""

    columns: ClassVar[frozenset[str]] = frozenset({"preference"})
    row_fields: ClassVar[frozenset[str] | None] = frozenset({"learns_prompt"})

    @classmethod
    def search_space(cls) -> dict[str, Space]:
        """The paper's own comparison goes from 0.1 to 1."""
        return {"objective.beta": Float(low=0.05, high=1.0, log=True)}

    def rows(self, example: Example, template: ChatTemplate) -> list[TokenRow]:
        """Puts both answers behind their prompt, one row a pair.

        Raises:
            DataError: The example is no pair.
        """
        from graft.objectives._preference import pair_row

        row = pair_row(example, template, self.type)
        if self.learns_prompt:
            row = row._replace(is_supervised=[at > 0 for at in range(len(row.input_ids))])
        return [row]

    def row_weight(self, row: TokenRow) -> float:
        """Counts pairs."""
        return 1.0

    def loss(self, outputs: TokenOutputs) -> torch.Tensor:
        """Returns each pair's loss."""
        from torch.nn.functional import logsigmoid

        is_learned = outputs.branch_P <= 1  # the chosen answer, and the prompt where it is a target
        learned = outputs.row_sums(outputs.logprobs_P * is_learned)
        counts = outputs.row_sums(is_learned.to(learned))
        return -learned / counts - self.beta * logsigmoid(self._log_odds_ratio(outputs))

    def figures(self, outputs: TokenOutputs) -> dict[str, torch.Tensor]:
        """Mean log-probabilities as rewards, and the log of the odds ratio."""
        from graft.objectives._preference import pair_figures, pair_means

        figures = pair_figures(self.beta * pair_means(outputs, outputs.logprobs_P))
        return figures | {"log_odds_ratio": self._log_odds_ratio(outputs)}

    def _log_odds_ratio(self, outputs: TokenOutputs) -> torch.Tensor:
        """Log of the odds of the chosen answer over those of the rejected one, `[num_rows]`."""
        from graft.objectives._preference import pair_means

        # A likelihood of 1 has infinite odds: one token of millions short of it is enough.
        means_N2 = pair_means(outputs, outputs.logprobs_P).clamp(max=-1e-6)
        log_odds_N2 = means_N2 - (-means_N2.expm1()).log()
        return log_odds_N2[:, 0] - log_odds_N2[:, 1]
