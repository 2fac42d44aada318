"""What objectives of preference pairs share: branch 1 is the chosen answer, branch 2 the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from graft.core.errors import DataError

if TYPE_CHECKING:
    from graft.data.records import Example, TokenRow
    from graft.data.template import ChatTemplate
    from graft.objectives.base import TokenOutputs


def pair_row(example: Example, template: ChatTemplate, objective: str) -> TokenRow:
    """Returns both answers behind their one prompt.

    Raises:
        DataError: The example is no pair.
    """
    if example.chosen is None or example.rejected is None:
        raise DataError(
            f"{example.source}: objective {objective!r} learns from pairs of answers, and this row "
            "has none; give rows with `prompt`, `chosen` and `rejected`"
        )
    answers = (example.chosen, example.rejected)
    return template.answers(example.prompt, answers, source=example.source)


def pair_means(outputs: TokenOutputs, values_P: torch.Tensor) -> torch.Tensor:
    """Returns the mean over each answer's tokens, `[num_rows, 2]`."""
    counts = outputs.branch_sums(torch.ones_like(values_P), 2)
    return outputs.branch_sums(values_P, 2) / counts


def pair_figures(rewards_N2: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns what is told of the rewards of chosen and rejected answers."""
    chosen, rejected = rewards_N2.unbind(1)
    return {
        "chosen_reward": chosen,
        "rejected_reward": rejected,
        "reward_margin": chosen - rejected,
        "reward_accuracy": (chosen > rejected).to(chosen),
    }
