"""Direct preference optimisation: the chosen answer over the rejected one, near a reference."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from graft.core.spaces import Float, Space
from graft.objectives.base import OBJECTIVES, Objective, TokenOutputs

if TYPE_CHECKING:
    import torch

    from graft.data.records import Example, TokenRow
    from graft.data.template import ChatTemplate


@OBJECTIVES.register
class DpoObjective(Objective):
    """Raises the chosen answer's likelihood over the rejected one's, against a frozen reference.

    For pairs of answers to one prompt, after supervised fine-tuning (`train.init_from`). The
    reference is what training started from. Both answers share the prompt's forward pass.

    Reference:
        Direct Preference Optimization, arXiv 2305.18290 (`sigmoid`). SLiC-HF, arXiv 2305.10425
        (`hinge`). A General Theoretical Paradigm to Understand Learning from Human Preferences,
        arXiv 2310.12036 (`ipo`). Iterative Reasoning Preference Optimization, arXiv 2404.19733
        (`sft_weight`).
    """

    type: Literal["dpo"] = "dpo"
    loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """`ipo` takes means over tokens, so that long answers weigh no more than short ones."""
    beta: float = Field(0.1, gt=0)
    """How close it stays to the reference: higher is closer. In `ipo` the paper's τ."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of pairs whose labels are thought to be swapped; `sigmoid` alone has it."""
    sft_weight: float = Field(0.0, ge=0)
    """Weight of the chosen answer's cross-entropy, a mean over its tokens, beside the preference.
    Without it both answers may grow less likely, the rejected one faster."""

    columns: ClassVar[frozenset[str]] = frozenset({"preference"})
    row_fields: ClassVar[frozenset[str] | None] = frozenset()
    needs: ClassVar[frozenset[str]] = frozenset({"reference"})

    @model_validator(mode="after")
    def smoothing_has_a_place(self) -> DpoObjective:
        """Refuses label smoothing where the loss has none."""
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise ValueError(
                f"label_smoothing has no meaning with loss_type {self.loss_type}; leave it at 0, "
                "or use loss_type sigmoid"
            )
        return self

    @classmethod
    def search_space(cls) -> dict[str, Space]:
        """The closeness moves results most; the paper's tasks take 0.1 to 0.5."""
        return {"objective.beta": Float(low=0.01, high=1.0, log=True)}

    def rows(self, example: Example, template: ChatTemplate) -> list[TokenRow]:
        """Puts both answers behind their prompt, one row a pair.

        Raises:
            DataError: The example is no pair.
        """
        from graft.objectives._preference import pair_row

        return [pair_row(example, template, self.type)]

    def row_weight(self, row: TokenRow) -> float:
        """Counts pairs."""
        return 1.0

    def loss(self, outputs: TokenOutputs) -> torch.Tensor:
        """Returns each pair's loss."""
        from graft.objectives._preference import pair_means

        loss = self._preference(outputs)
        if self.sft_weight:
            loss = loss - self.sft_weight * pair_means(outputs, outputs.logprobs_P)[:, 0]
        return loss

    def _preference(self, outputs: TokenOutputs) -> torch.Tensor:
        from torch.nn.functional import logsigmoid, relu

        from graft.objectives._preference import pair_means

        ratios_P = outputs.logprobs_P - outputs.reference_P
        if self.loss_type == "ipo":
            chosen, rejected = pair_means(outputs, ratios_P).unbind(1)
            return (chosen - rejected - 1 / (2 * self.beta)).square()
        chosen, rejected = outputs.branch_sums(ratios_P, 2).unbind(1)
        margin = self.beta * (chosen - rejected)
        if self.loss_type == "hinge":
            return relu(1 - margin)
        right, swapped = -logsigmoid(margin), -logsigmoid(-margin)
        return (1 - self.label_smoothing) * right + self.label_smoothing * swapped

    def figures(self, outputs: TokenOutputs) -> dict[str, torch.Tensor]:
        """The implicit rewards: `beta` times an answer's log-ratio; and how often they agree."""
        from graft.objectives._preference import pair_figures

        ratios_P = outputs.logprobs_P - outputs.reference_P
        return pair_figures(self.beta * outputs.branch_sums(ratios_P, 2))
