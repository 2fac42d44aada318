"""What every objective owes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from graft.data.records import Example, Message
from graft.testing._variant_contract import VariantContract, require_bounds
from graft.testing.tiny import tiny_model, tiny_rows, tiny_tokenizer

if TYPE_CHECKING:
    import torch

    from graft.data.records import TokenRow
    from graft.data.template import ChatTemplate
    from graft.objectives.base import Objective, TokenOutputs


class ObjectiveContract(VariantContract):
    """Rows with something to learn; a loss that is finite, differentiable and a sum over rows."""

    family = "Objective"

    @pytest.fixture
    def examples(self, variant: Objective) -> list[Example]:
        """Examples of the first kind that the objective learns from."""
        found = []
        for number, row in enumerate(tiny_rows(4), 1):
            user, assistant = (Message(**message) for message in row["messages"])
            kinds: dict[str, dict[str, Any]] = {
                "messages": {"messages": (user, assistant)},
                "preference": {"prompt": (user,), "chosen": assistant.content, "rejected": "no"},
                "text": {"text": assistant.content},
            }
            found.append(Example(source=f"contract:{number}", **kinds[min(variant.columns)]))
        return found

    @pytest.fixture
    def example(self, examples: list[Example]) -> Example:
        """The first of them."""
        return examples[0]

    @pytest.fixture
    def template(self) -> ChatTemplate:
        """Of the tiny model."""
        from graft.data.template import ChatTemplate

        return ChatTemplate(tiny_tokenizer())

    def test_its_rows_have_targets_and_weight(
        self, variant: Objective, example: Example, template: ChatTemplate
    ) -> None:
        rows = variant.rows(example, template)
        assert rows
        for row in rows:
            assert len(row.input_ids) == len(row.is_supervised)
            assert any(row.is_supervised)
            assert row.source == example.source
            assert variant.row_weight(row) > 0

    def test_its_loss_is_a_sum_over_rows(
        self, variant: Objective, example: Example, template: ChatTemplate
    ) -> None:
        import torch

        rows = _learned(variant, [r for _ in range(2) for r in variant.rows(example, template)])
        together, leaves = _outputs(variant, rows)
        losses = variant.loss(together)
        assert losses.shape == (len(rows),)
        assert bool(losses.isfinite().all())
        apart = [_outputs(variant, rows, only=at)[0] for at in range(len(rows))]
        torch.testing.assert_close(losses, torch.cat([variant.loss(one) for one in apart]))
        losses.sum().backward()
        gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
        assert gradients
        assert all(bool(g.isfinite().all() and g.any()) for g in gradients)

    def test_search_space_is_inside_the_field_bounds(self, variant: Objective) -> None:
        require_bounds(variant)

    @pytest.mark.parametrize("method", ["lora", "dora", "ia3", "prefix", "full"])
    def test_it_trains_with_every_kind_of_method(
        self, variant: Objective, examples: list[Example], template: ChatTemplate, method: str
    ) -> None:
        from graft.engine.multi.model import MultiAdapterModel
        from graft.engine.train import Trainer
        from graft.recipe.sections import Recipe

        rows = [row for example in examples for row in variant.rows(example, template)]
        # What is sampled changes from step to step: one rollout is learned for all of them.
        iterations = {"num_iterations": 6} if "rollouts" in variant.needs else {}
        recipe = Recipe.model_validate(
            {
                "model": {"source": "tiny"},
                "data": {"train": "none.jsonl"},
                "method": method,
                "objective": variant.model_copy(update=iterations),
                "train": {
                    "steps": 6,
                    "batch_size": len(rows),
                    "lr": 2e-3,
                    "schedule": "constant",
                    "warmup_fraction": 0.0,
                },
            }
        )
        trainer = Trainer(MultiAdapterModel(tiny_model()), template=template)
        trainer.join("own", recipe, rows)
        first, *_, last = [trainer.step()["own"] for _ in range(6)]
        assert last.is_finished
        assert last.loss < first.loss

    def test_its_figures_are_a_number_a_row(
        self, variant: Objective, example: Example, template: ChatTemplate
    ) -> None:
        rows = _learned(variant, variant.rows(example, template))
        outputs, _ = _outputs(variant, rows)
        for name, of_rows in variant.figures(outputs).items():
            assert name.isidentifier()
            assert of_rows.shape == (len(rows),)


def _learned(objective: Objective, rows: list[TokenRow]) -> list[TokenRow]:
    """The rows, or what an objective with rollouts would learn of them, made up."""
    import torch

    from graft.engine.rollouts import carrying_rows
    from graft.engine.scoring import outputs_of
    from graft.objectives.base import REFERENCE
    from graft.objectives.sampling import SamplingObjective

    if not isinstance(objective, SamplingObjective):
        return rows
    size = objective.group_size
    answered = []
    for row in rows:
        prompt, answer = row.input_ids[: row.num_prompt_tokens], row.input_ids[-4:]
        ids = prompt + answer * size
        branch = [0] * len(prompt) + [k for k in range(1, size + 1) for _ in answer]
        is_supervised = [k > 0 for k in branch]
        answered.append(row._replace(input_ids=ids, branch=branch, is_supervised=is_supervised))
    generator = torch.Generator().manual_seed(1)
    logprobs, reference, values = (
        [torch.rand(len(row.targets), generator=generator).neg().tolist() for row in answered]
        for _ in range(3)
    )
    outputs = outputs_of(answered, logprobs, {REFERENCE: reference}, values)
    rewards_NG = torch.rand(len(rows), size, generator=generator).double()
    return carrying_rows(answered, objective.experience(outputs, rewards_NG))


def _outputs(
    objective: Objective, rows: list[TokenRow], only: int | None = None
) -> tuple[TokenOutputs, list[torch.Tensor]]:
    """Made-up outputs of some rows, or of one of them, and what in them takes gradients."""
    import torch

    from graft.engine.scoring import outputs_of
    from graft.objectives.base import REFERENCE

    generator = torch.Generator().manual_seed(0)
    drawn = [
        [-torch.rand(len(row.targets), generator=generator).double() for row in rows]
        for _ in range(3)
    ]
    at = slice(None) if only is None else slice(only, only + 1)
    logprobs, reference, values = ([scores.tolist() for scores in of_rows[at]] for of_rows in drawn)
    extra: dict[str, Any] = {
        key: [(row.extra or {})[key] for row in rows[at]] for key in rows[0].extra or {}
    }
    if "reference" in objective.needs:
        extra[REFERENCE] = reference
    has_values = "values" in objective.needs
    outputs = outputs_of(rows[at], logprobs, extra, values if has_values else None)
    statistics = objective.statistics(outputs) if objective.probe_rows(rows) else {}
    leaves = [outputs.logprobs_P.requires_grad_()]
    if outputs.values_P is not None:
        leaves.append(outputs.values_P.requires_grad_())
    return replace(outputs, statistics=dict.fromkeys(statistics, 0.1)), leaves
