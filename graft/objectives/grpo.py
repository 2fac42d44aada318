"""Group-relative policy optimisation: answers learn from how they compare with their group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator

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

_SMALLEST_STD = 1e-4
"""Added to the deviation that advantages are divided by."""


@OBJECTIVES.register
class GrpoObjective(SamplingObjective):
    """Learns from rewards of sampled answers, without a value head.

    The advantage of an answer is its reward less the mean of its group, the answers to one prompt.
    What a group agrees on, all right or all wrong, teaches nothing. The denominator of the loss is
    of the whole step, so `bnpo`, whose own is of one micro-batch, is the same as `dapo` here.

    Reference:
        DeepSeekMath, arXiv 2402.03300 (`grpo`). Understanding R1-Zero-Like Training, arXiv
        2503.20783 (`dr_grpo`, `scale_rewards: none`). DAPO, arXiv 2503.14476 (`dapo`,
        `epsilon_high`). Lite PPO, arXiv 2508.08221 (`scale_rewards: batch`). DeepSeek-V3.2, arXiv
        2512.02556 (`use_bias_correction_kl`).
    """

    type: Literal["grpo"] = "grpo"
    group_size: int = 8
    """Answers to each prompt, at least 2; `train.batch_size` counts prompts."""
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = "dapo"
    """How long answers count: `grpo` each answer alike, `bnpo` and `dapo` each token alike,
    `dr_grpo` each token alike over a constant, answers times `max_new_tokens`."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Advantages are divided by the deviation of rewards in the group, in the whole step, or by
    nothing."""
    beta: float = Field(0.0, ge=0)
    """Weight of the divergence from the reference in the loss."""
    use_bias_correction_kl: bool = True
    """Weigh that divergence by how much likelier a token is than when it was sampled: its gradient
    is then the divergence's own, on average."""
    epsilon: float = Field(0.2, gt=0, lt=1)
    """How far a token's likelihood may move from where it was sampled before it stops counting."""
    epsilon_high: float | None = Field(None, gt=0)
    """The same upwards; None is as `epsilon`."""

    @field_validator("group_size")
    @classmethod
    def group_has_company(cls, group_size: int) -> int:
        """Refuses a group of one: its answer would be compared with itself."""
        if group_size < 2:
            raise ValueError(
                f"group_size {group_size}: an answer is compared with the others of its group; "
                "give at least 2, or use objective ppo"
            )
        return group_size

    @classmethod
    def search_space(cls) -> dict[str, Space]:
        """How close it stays to the reference; DeepSeekMath's own is 0.04."""
        return {"objective.beta": Float(low=1e-3, high=0.1, log=True)}

    @property
    def reads_reference(self) -> bool:
        """Also for the loss."""
        return self.beta > 0 or super().reads_reference

    def experience(
        self, answers: TokenOutputs, rewards_NG: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The advantage of each answer at each of its tokens."""
        advantages_NG = rewards_NG - rewards_NG.mean(1, keepdim=True)
        if self.scale_rewards != "none":
            is_group = self.scale_rewards == "group"
            std = rewards_NG.std(1, keepdim=True) if is_group else rewards_NG.std()
            advantages_NG = advantages_NG / (std + _SMALLEST_STD)
        found = {ADVANTAGES: advantages_NG[answers.row_P, answers.branch_P - 1]}
        if self.num_iterations > 1:
            found[OLD_LOGPROBS] = answers.logprobs_P
        return found

    def row_weight(self, row: TokenRow) -> float:
        """Counts tokens or answers, as `loss_type` says."""
        if self.loss_type == "grpo":
            return float(row.num_branches)
        if self.loss_type == "dr_grpo":
            return float(row.num_branches * self.max_new_tokens)
        return float(len(row.targets))

    def loss(self, outputs: TokenOutputs) -> torch.Tensor:
        """Returns the loss of each prompt's answers."""
        import torch

        advantages_P = outputs.extra[ADVANTAGES]
        ratio_P = self._ratio(outputs)
        clipped_P = ratio_P.clamp(1 - self.epsilon, 1 + self._epsilon_high)
        losses_P = -torch.minimum(ratio_P * advantages_P, clipped_P * advantages_P)
        if self.beta:
            losses_P = losses_P + self.beta * self._divergence(outputs, ratio_P)
        if self.loss_type != "grpo":
            return outputs.row_sums(losses_P)
        num_answers = int(outputs.branch_P.max())
        counts = outputs.branch_sums(torch.ones_like(losses_P), num_answers).clamp(min=1)
        return (outputs.branch_sums(losses_P, num_answers) / counts).sum(1)

    def figures(self, outputs: TokenOutputs) -> dict[str, torch.Tensor]:
        """Divergence, entropy and the share of clipped tokens, means over a row's tokens."""
        ratio_P, advantages_P = self._ratio(outputs), outputs.extra[ADVANTAGES]
        is_low_P = (ratio_P < 1 - self.epsilon) & (advantages_P < 0)
        is_high_P = (ratio_P > 1 + self._epsilon_high) & (advantages_P > 0)
        found = {"clip_fraction": (is_low_P | is_high_P).to(ratio_P)}
        if self.reads_reference:
            found["kl"] = self._divergence(outputs, ratio_P)
        return told_means(outputs, found)

    @property
    def _epsilon_high(self) -> float:
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    def _divergence(self, outputs: TokenOutputs, ratio_P: torch.Tensor) -> torch.Tensor:
        divergence_P = divergence(outputs)
        return divergence_P * ratio_P if self.use_bias_correction_kl else divergence_P

    def _ratio(self, outputs: TokenOutputs) -> torch.Tensor:
        """How much likelier each token is than when it was sampled."""
        old_P = outputs.extra.get(OLD_LOGPROBS, outputs.logprobs_P.detach())
        return (outputs.logprobs_P - old_P).exp()
