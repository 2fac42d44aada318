"""Kahneman-Tversky optimisation: answers known to be wanted or not, without pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from graft.core.errors import DataError
from graft.core.spaces import Float, Space
from graft.objectives.base import OBJECTIVES, Objective, TokenOutputs

if TYPE_CHECKING:
    import torch

    from graft.data.records import Example, TokenRow
    from graft.data.template import ChatTemplate


@OBJECTIVES.register
class KtoObjective(Objective):
    """Makes wanted answers likelier and unwanted ones less likely, each against a common zero.

    For single answers with a thumb up or down; pairs are taken apart. The zero is the KL divergence
    from the reference, estimated anew in each step: every prompt of the whole step with the answer
    of the row before it. So a step's size matters here, and larger steps estimate it better.

    Reference:
        KTO: Model Alignment as Prospect Theoretic Optimization, arXiv 2402.01306.
    """

    type: Literal["kto"] = "kto"
    beta: float = Field(0.1, gt=0)
    """How fast gains and losses saturate: higher stays closer to the reference."""
    desirable_weight: float = Field(1.0, gt=0)
    """Weight of wanted answers; where there are fewer of them, raise it until both weigh alike."""
    undesirable_weight: float = Field(1.0, gt=0)
    """Weight of unwanted answers."""

    columns: ClassVar[frozenset[str]] = frozenset({"unpaired", "preference"})
    row_fields: ClassVar[frozenset[str] | None] = frozenset()
    needs: ClassVar[frozenset[str]] = frozenset({"reference"})
    smallest_batch: ClassVar[int] = 2

    @classmethod
    def search_space(cls) -> dict[str, Space]:
        """The paper's own ranges, the weight's for as many wanted rows as unwanted ones."""
        return {
            "objective.beta": Float(low=0.01, high=1.0, log=True),
            "objective.desirable_weight": Float(low=1.0, high=1.33),
        }

    def rows(self, example: Example, template: ChatTemplate) -> list[TokenRow]:
        """Puts an answer behind its prompt; a pair gives a wanted row and an unwanted one.

        Raises:
            DataError: The example is neither an answer with a label nor a pair.
        """
        known = (
            (example.answer, float(bool(example.is_wanted))),
            (example.chosen, 1.0),
            (example.rejected, 0.0),
        )
        rows = [
            template.answers(example.prompt, [answer], source=example.source)._replace(label=label)
            for answer, label in known
            if answer is not None
        ]
        if not rows:
            raise DataError(
                f"{example.source}: objective 'kto' learns from answers with a label, and this row "
                "has none; give rows with `prompt`, `completion` and `label` (true or false), or "
                "pairs"
            )
        return rows

    def require_rows(self, rows: list[TokenRow], source: str) -> None:
        """Refuses rows of one kind, and pairs of the same tokens: nothing could be told apart.

        Raises:
            DataError: All answers are wanted, or none is; or one is both.
        """
        labels_of: dict[tuple[str, tuple[int, ...]], float | None] = {}
        for row in rows:
            if labels_of.setdefault((row.source, tuple(row.input_ids)), row.label) != row.label:
                raise DataError(
                    f"{row.source}: both answers of the pair are the same tokens, one wanted and "
                    "one not; if they were cut, raise data.max_length"
                )
        labels = {row.label for row in rows}
        if len(labels) == 1:
            kind = "wanted" if labels == {1.0} else "unwanted"
            raise DataError(
                f"{source}: all {len(rows)} answers are {kind}, and objective 'kto' learns from "
                "both kinds; add rows with the other label, or use objective sft for wanted ones"
            )

    def row_weight(self, row: TokenRow) -> float:
        """Counts answers."""
        return 1.0

    def probe_rows(self, rows: list[TokenRow]) -> list[TokenRow]:
        """Puts behind each prompt the answer of the row before."""
        before = [*rows[-1:], *rows[:-1]]
        return [_mismatched(asked, said) for asked, said in zip(rows, before, strict=True)]

    def statistics(self, probes: TokenOutputs) -> dict[str, float]:
        """Estimates the KL divergence from the reference, at least 0."""
        ratios = probes.row_sums(probes.logprobs_P - probes.reference_P)
        return {"kl": max(float(ratios.mean()), 0.0)}

    def loss(self, outputs: TokenOutputs) -> torch.Tensor:
        """Returns each answer's loss."""
        is_wanted = outputs.labels == 1
        gain = self._log_ratios(outputs) - outputs.statistics["kl"]
        value = (self.beta * gain.where(is_wanted, -gain)).sigmoid()
        weights = value.new_full(value.shape, self.undesirable_weight)
        return weights.masked_fill(is_wanted, self.desirable_weight) * (1 - value)

    def figures(self, outputs: TokenOutputs) -> dict[str, torch.Tensor]:
        """The implicit rewards of wanted and of unwanted answers, and the estimated divergence."""
        rewards = self.beta * self._log_ratios(outputs)
        is_wanted = outputs.labels == 1
        nothing = float("nan")
        return {
            "chosen_reward": rewards.masked_fill(~is_wanted, nothing),
            "rejected_reward": rewards.masked_fill(is_wanted, nothing),
            "kl": rewards.new_full(rewards.shape, outputs.statistics["kl"]),
        }

    def _log_ratios(self, outputs: TokenOutputs) -> torch.Tensor:
        return outputs.row_sums(outputs.logprobs_P - outputs.reference_P)


def _mismatched(asked: TokenRow, said: TokenRow) -> TokenRow:
    num_prompt = asked.num_prompt_tokens
    answer = said.input_ids[said.num_prompt_tokens :]
    return asked._replace(
        input_ids=asked.input_ids[:num_prompt] + answer,
        is_supervised=[False] * num_prompt + [True] * len(answer),
        branch=[0] * num_prompt + [1] * len(answer),
        source=f"{asked.source} with the answer of {said.source}",
        label=None,
    )
