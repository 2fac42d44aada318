"""Proximal policy optimisation: answers learn from how much better they end than was expected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from graft.core.spaces import Float, Space
from graft.objectives.base import OBJECTIVES, TokenOutputs
from graft.objectives.sampling import (
    ADVANTAGES,
    OLD_LOGPROBS,
    SamplingObjective,
    divergence,
    told_means,
)

if TYPE_CHECKING:
    import torch

    from graft.data.records import TokenRow

RETURNS = "returns"
OLD_VALUES = "old_values"

_SMALLEST_STD = 1e-8


@OBJECTIVES.register
class PpoObjective(SamplingObjective):
    """Learns from rewards of sampled answers, token by token, with a value head beside the policy.

    The head is a linear layer on the slot's own last state, so policy, value and reference are one
    base; it is not published. What an answer earns comes with its last token, and at each token the
    divergence from the reference is taken off. An answer that was cut counts as ended there.

    Reference:
        Proximal Policy Optimization Algorithms, arXiv 1707.06347; advantages: High-Dimensional
        Continuous Control Using Generalized Advantage Estimation, arXiv 1506.02438; divergence in
        the reward: Fine-Tuning Language Models from Human Preferences, arXiv 1909.08593.
    """

    type: Literal["ppo"] = "ppo"
    num_iterations: int = Field(4, ge=1)
    """Steps on the same answers before new ones are sampled."""
    beta: float = Field(0.05, ge=0)
    """Weight of the divergence from the reference in each token's reward."""
    gamma: float = Field(1.0, ge=0, le=1)
    """What a reward is worth one token earlier."""
    lam: float = Field(0.95, ge=0, le=1)
    """How far advantages look ahead: 0 trusts the values, 1 the rewards alone."""
    epsilon: float = Field(0.2, gt=0, lt=1)
    """How far a token's likelihood may move from where it was sampled before it stops counting."""
    value_epsilon: float = Field(0.2, gt=0)
    """How far a value may move from where it was before it stops counting."""
    value_coefficient: float = Field(0.1, ge=0)
    """Weight of the values' squared errors."""
    whitens_advantages: bool = True
    """Advantages have mean 0 and deviation 1 over all tokens that were sampled together."""

    needs: ClassVar[frozenset[str]] = SamplingObjective.needs | {"values"}

    @classmethod
    def search_space(cls) -> dict[str, Space]:
        """How close it stays to the reference, and how far advantages look."""
        return {
            "objective.beta": Float(low=0.005, high=0.5, log=True),
            "objective.lam": Float(low=0.9, high=1.0),
        }

    @property
    def reads_reference(self) -> bool:
        """Also for the reward."""
        return self.beta > 0 or super().reads_reference

    @property
    def reads_own_answers(self) -> bool:
        """Values are needed in any case."""
        return True

    def experience(
        self, answers: TokenOutputs, rewards_NG: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Advantages and returns at each token, and what policy and values were."""
        import torch

        assert answers.values_P is not None  # `needs` has them
        is_last_P = _is_last(answers)
        earned_P = is_last_P * rewards_NG[answers.row_P, answers.branch_P - 1]
        if self.beta:
            earned_P = earned_P - self.beta * (answers.logprobs_P - answers.reference_P)
        advantages = generalized_advantages(
            earned_P.tolist(),
            answers.values_P.tolist(),
            is_last_P.tolist(),
            gamma=self.gamma,
            lam=self.lam,
        )
        advantages_P = torch.tensor(advantages, dtype=torch.float64)
        returns_P = advantages_P + answers.values_P
        if self.whitens_advantages and len(advantages) > 1:
            centred_P = advantages_P - advantages_P.mean()
            advantages_P = centred_P / (advantages_P.std() + _SMALLEST_STD)
        return {
            ADVANTAGES: advantages_P,
            RETURNS: returns_P,
            OLD_LOGPROBS: answers.logprobs_P,
            OLD_VALUES: answers.values_P,
        }

    def row_weight(self, row: TokenRow) -> float:
        """Counts the answers' tokens."""
        return float(len(row.targets))

    def loss(self, outputs: TokenOutputs) -> torch.Tensor:
        """Returns the loss of each prompt's answers: that of the policy, and that of the values."""
        policy_P, _ = self._policy_losses(outputs)
        return outputs.row_sums(policy_P + self.value_coefficient * self._value_losses(outputs))

    def figures(self, outputs: TokenOutputs) -> dict[str, torch.Tensor]:
        """Divergence, entropy, values' errors and clipped tokens, means over a row's tokens."""
        _, is_clipped_P = self._policy_losses(outputs)
        found = {
            "clip_fraction": is_clipped_P.to(outputs.logprobs_P),
            "value_loss": self._value_losses(outputs),
        }
        if self.reads_reference:
            found["kl"] = divergence(outputs)
        return told_means(outputs, found)

    def _policy_losses(self, outputs: TokenOutputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of each token, and whether it was clipped."""
        import torch

        advantages_P = outputs.extra[ADVANTAGES]
        ratio_P = (outputs.logprobs_P - outputs.extra[OLD_LOGPROBS]).exp()
        free_P = -advantages_P * ratio_P
        clipped_P = -advantages_P * ratio_P.clamp(1 - self.epsilon, 1 + self.epsilon)
        return torch.maximum(free_P, clipped_P), clipped_P > free_P

    def _value_losses(self, outputs: TokenOutputs) -> torch.Tensor:
        import torch

        assert outputs.values_P is not None  # `needs` has them
        values_P, old_P = outputs.values_P, outputs.extra[OLD_VALUES]
        returns_P = outputs.extra[RETURNS]
        near_P = torch.clamp(values_P, old_P - self.value_epsilon, old_P + self.value_epsilon)
        errors_P = torch.maximum((values_P - returns_P) ** 2, (near_P - returns_P) ** 2)
        return 0.5 * errors_P


def generalized_advantages(
    rewards: Sequence[float],
    values: Sequence[float],
    is_last: Sequence[bool],
    *,
    gamma: float,
    lam: float,
) -> list[float]:
    """Estimates the advantage of each step of some episodes behind each other.

    Args:
        rewards: Of each step.
        values: Of the state before each step.
        is_last: The step ends its episode; what follows is worth nothing.
        gamma: Discount of rewards.
        lam: Discount of what values did not foresee.
    """
    found = [0.0] * len(rewards)
    ahead = next_value = 0.0
    for at in reversed(range(len(rewards))):
        if is_last[at]:
            ahead = next_value = 0.0
        surprise = rewards[at] + gamma * next_value - values[at]
        ahead = surprise + gamma * lam * ahead
        found[at], next_value = ahead, values[at]
    return found


def _is_last(outputs: TokenOutputs) -> torch.Tensor:
    """Tells the last token of each answer, `[positions]`, bool."""
    import torch

    is_last_P = torch.ones_like(outputs.row_P, dtype=torch.bool)
    is_new_row = outputs.row_P[1:] != outputs.row_P[:-1]
    is_last_P[:-1] = is_new_row | (outputs.branch_P[1:] != outputs.branch_P[:-1])
    return is_last_P
