"""Objectives that learn from answers which the model itself gives, and from what they earn.

Every `num_iterations` steps the engine samples `group_size` answers to each of the step's prompts
with the slot's weights of that step, and has them scored by `rewards`. The answers to a prompt are
the branches of one row. `experience` says what the rows are to carry besides, and then they are
learned from like any others, for `num_iterations` steps.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, field_validator, model_validator

from graft.core.errors import DataError
from graft.core.model import Listed
from graft.data.prepare import prompt_of
from graft.metrics.rewards import Reward
from graft.objectives.base import Objective, TokenOutputs

if TYPE_CHECKING:
    import torch

    from graft.data.records import Example, TokenRow
    from graft.data.template import ChatTemplate

ADVANTAGES = "advantages"
OLD_LOGPROBS = "old_logprobs"


class SamplingObjective(Objective):
    """Base of the objectives with rollouts."""

    rewards: Listed[Reward] = Field(
        examples=[[{"metric": {"type": "length", "max_chars": 100}}]],
    )
    """What answers earn: metrics of answers with weights, summed."""
    group_size: int = Field(1, ge=1)
    """Answers to each prompt; `train.batch_size` counts prompts."""
    temperature: float = Field(1.0, gt=0)
    """Of sampling, and of the distributions that are learned."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the likeliest tokens of this mass only; below 1 what is learned is a little off
    what is sampled."""
    max_new_tokens: int = Field(64, ge=1)
    """Longest answer; a longer one is cut and learned as it stands, without an end."""
    num_iterations: int = Field(1, ge=1)
    """Steps on the same answers before new ones are sampled."""
    max_kl: float | None = Field(10.0, gt=0)
    """Ends a run whose mean divergence from the reference a token, nats, is above it. Where it is
    null and `beta` is 0, the reference is not asked and no divergence is told."""
    min_answer_tokens: float | None = Field(None, gt=0)
    """Ends a run whose answers are shorter on average, their end counted."""
    max_answer_tokens: float | None = Field(None, gt=0)
    """Ends a run whose answers are longer on average."""

    columns: ClassVar[frozenset[str]] = frozenset({"messages", "prompts", "preference", "unpaired"})
    row_fields: ClassVar[frozenset[str] | None] = frozenset()
    needs: ClassVar[frozenset[str]] = frozenset({"rollouts", "reference", "entropy"})

    @field_validator("rewards")
    @classmethod
    def something_is_earned(cls, rewards: tuple[Reward, ...]) -> tuple[Reward, ...]:
        """Refuses answers that earn nothing."""
        if not rewards:
            raise ValueError(
                "no reward is named, so no answer is better than another; name at least one, as "
                "in [{metric: exact_match}]"
            )
        if not any(reward.weight for reward in rewards):
            raise ValueError(
                "every weight is 0, so no answer is better than another; a reward of weight 0 is "
                "only reported: give at least one another weight"
            )
        return rewards

    @model_validator(mode="after")
    def bounds_leave_room(self) -> SamplingObjective:
        """Refuses a smallest length above the largest."""
        least, most = self.min_answer_tokens, self.max_answer_tokens
        if least is not None and most is not None and least > most:
            raise ValueError(
                f"min_answer_tokens {least:g} is above max_answer_tokens {most:g}, so every run "
                "would end at its first step; lower the one or raise the other"
            )
        return self

    @property
    def reads_reference(self) -> bool:
        """The divergence from the reference is asked for; else no answer is read under it."""
        return self.max_kl is not None

    @property
    def reads_own_answers(self) -> bool:
        """`experience` needs what the weights that sampled make of the answers."""
        return self.num_iterations > 1

    def rows(self, example: Example, template: ChatTemplate) -> list[TokenRow]:
        """Takes the prompt, and the wanted answer where one is known.

        That answer is what metrics compare sampled ones with; it is not learned.

        Raises:
            DataError: The example asks nothing.
        """
        if not (example.messages or example.prompt):
            raise DataError(
                f"{example.source}: objective {self.type!r} samples answers to prompts, and this "
                "row has none; give rows with `prompt`, or conversations"
            )
        asked = prompt_of(example, template)
        messages = example.prompt or example.messages[:-1]
        answers = [asked.reference] if asked.reference else []
        row = template.answers(messages, answers, source=example.source)
        return [row._replace(asked=asked)]

    @abstractmethod
    def experience(
        self, answers: TokenOutputs, rewards_NG: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Returns what the sampled rows carry to the loss: name → a number a position.

        Called once for all answers that were sampled together, by every worker alike.

        Args:
            answers: Rows with the answers as branches, every token of an answer a target. In
                double precision, without gradient, under the weights that sampled them; where not
                `reads_own_answers`, their log-probabilities are NaN and they have no values; where
                not `reads_reference`, there are none of it.
            rewards_NG: What each answer earned, `[num_rows, group_size]`.
        """

    def collapse(self, figures: Mapping[str, float]) -> str | None:
        """Says which bound a step is past."""
        nothing = math.nan
        kl = figures.get("kl", nothing)
        tokens = figures.get("answer_tokens", nothing)
        if self.max_kl is not None and kl > self.max_kl:
            return (
                f"a divergence from the reference of {kl:.3g} a token: above max_kl {self.max_kl:g}"
            )
        if self.min_answer_tokens is not None and tokens < self.min_answer_tokens:
            low = self.min_answer_tokens
            return f"answers of {tokens:.3g} tokens: below min_answer_tokens {low:g}"
        if self.max_answer_tokens is not None and tokens > self.max_answer_tokens:
            high = self.max_answer_tokens
            return f"answers of {tokens:.3g} tokens: above max_answer_tokens {high:g}"
        return None


def told_means(
    outputs: TokenOutputs, of_positions: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Returns means over each row's positions, with entropy where it is known."""
    found = dict(of_positions)
    if outputs.entropy_P is not None:
        found["entropy"] = outputs.entropy_P
    counts = outputs.row_sums(outputs.logprobs_P.new_ones(outputs.logprobs_P.shape))
    return {name: outputs.row_sums(values_P) / counts for name, values_P in found.items()}


def divergence(outputs: TokenOutputs) -> torch.Tensor:
    """Estimates the divergence from the reference at each position, never below 0.

    Reference:
        Approximating KL Divergence, Schulman 2020 (the estimator k3).
    """
    log_ratio_P = outputs.reference_P - outputs.logprobs_P
    return log_ratio_P.exp() - log_ratio_P - 1
