"""Training on a mixture: the loss of each source by its own objective, and what does not matter."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch

from graft.core.errors import DataError
from graft.data.records import TokenRow
from graft.engine.mixture import MixedObjective, draw_of
from graft.engine.multi import AdapterTensors, MultiAdapterModel
from graft.engine.train import Trainer
from graft.objectives.base import Objective, TokenOutputs
from graft.objectives.pretrain import PretrainObjective
from graft.objectives.sft import SftObjective
from graft.recipe.sections import Recipe
from tests.unit.engine.conftest import exact_model, make_recipe, make_rows
from tests.unit.engine.test_packed_equals_alone import largest_difference

STEPS = 6


class PairObjective(SftObjective):
    """Counts rows, not tokens, and measures against what the step's probes said."""

    scale: float = 1.0
    columns: ClassVar[frozenset[str]] = frozenset({"messages"})

    def row_weight(self, row: TokenRow) -> float:
        """Counts rows."""
        return 1.0

    def probe_rows(self, rows: list[TokenRow]) -> list[TokenRow]:
        """The rows themselves, without their part: a probe may be any row."""
        return [TokenRow(row.input_ids, row.is_supervised, row.source) for row in rows]

    def statistics(self, probes: TokenOutputs) -> dict[str, float]:
        """The largest log-probability sum of a row of the step."""
        return {"best": float(probes.row_sums(probes.logprobs_P).max())}

    def loss(self, outputs: TokenOutputs) -> torch.Tensor:
        """How far each row is below the best."""
        return self.scale * (outputs.statistics["best"] - outputs.row_sums(outputs.logprobs_P))

    def figures(self, outputs: TokenOutputs) -> dict[str, torch.Tensor]:
        """The tokens of each row."""
        return {"length": outputs.row_sums(torch.ones_like(outputs.logprobs_P))}


def mixture(
    first: Objective, second: Objective, weights: tuple[float, float] = (0.6, 0.4), **train: Any
) -> Recipe:
    sources = [
        {"name": name, "train": "x.jsonl", "weight": weight, "objective": objective}
        for name, weight, objective in zip("ab", weights, (first, second), strict=True)
    ]
    settings = {"steps": STEPS, "batch_size": 8, "lr": 1e-3, "seed": 5, **train}
    return make_recipe(
        data={"sources": sources},
        method={"type": "lora", "r": 4, "lora_dropout": 0.1},
        train=settings,
    )


ROWS = [
    *(row._replace(part="a") for row in make_rows(10, lengths=(5, 12), seed=1)),
    *(row._replace(part="b") for row in make_rows(7, lengths=(10, 40), seed=2)),
]


def joined(*recipes: Recipe) -> Trainer:
    trainer = Trainer(MultiAdapterModel(exact_model()))
    for number, recipe in enumerate(recipes):
        trainer.join(str(number), recipe, ROWS)
    return trainer


def trained(trainer: Trainer) -> AdapterTensors:
    while trainer.step():
        pass
    return trainer.state("0").tensors


def row_losses(rows: list[TokenRow]) -> list[float]:
    """Summed loss of each row under the bare model, one row and one token at a time."""
    model, found = exact_model(), []
    for row in rows:
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
        own = [float(logprobs[at - 1, row.input_ids[at]]) for at in row.targets]
        found.append(-sum(own))
    return found


def test_sources_of_one_objective_are_averaged_by_token_as_one_file_is() -> None:
    recipe = mixture(SftObjective(), SftObjective(), steps=1)
    taken = [ROWS[at] for at in draw_of(recipe, ROWS)(0)]
    assert {row.part for row in taken} == {"a", "b"}
    losses, tokens = row_losses(taken), [len(row.targets) for row in taken]
    report = joined(recipe).step()["0"]
    assert report.loss == pytest.approx(sum(losses) / sum(tokens), abs=1e-9)
    for part in "ab":
        own = [at for at, row in enumerate(taken) if row.part == part]
        mean = sum(losses[at] for at in own) / sum(tokens[at] for at in own)
        assert report.figures[f"{part}/loss"] == pytest.approx(mean, abs=1e-9)


def test_different_objectives_are_averaged_each_over_its_own_and_then_by_rows() -> None:
    recipe = mixture(PretrainObjective(), PairObjective(scale=3.0), steps=1)
    taken = [ROWS[at] for at in draw_of(recipe, ROWS)(0)]
    losses = row_losses(taken)
    is_a = [row.part == "a" for row in taken]
    of_a = [loss for loss, own in zip(losses, is_a, strict=True) if own]
    of_b = [loss for loss, own in zip(losses, is_a, strict=True) if not own]
    tokens_a = sum(len(row.targets) for row in taken if row.part == "a")
    mean_a = sum(of_a) / tokens_a
    mean_b = sum(3 * (loss - min(of_b)) for loss in of_b) / len(of_b)
    report = joined(recipe).step()["0"]
    expected = (len(of_a) * mean_a + len(of_b) * mean_b) / len(taken)
    assert report.loss == pytest.approx(expected, abs=1e-9)
    assert report.figures["a/loss"] == pytest.approx(mean_a, abs=1e-9)
    assert report.figures["b/loss"] == pytest.approx(mean_b, abs=1e-9)
    lengths_b = [len(row.targets) for row in taken if row.part == "b"]
    assert report.figures["b/length"] == pytest.approx(sum(lengths_b) / len(lengths_b))
    assert set(report.figures) == {"a/loss", "b/loss", "b/length"}


def test_a_mixture_of_one_objective_takes_the_steps_of_one_file() -> None:
    recipe = mixture(SftObjective(), SftObjective())
    ours = trained(joined(recipe))
    drawn = [
        ROWS[at]._replace(part="") for step in range(STEPS) for at in draw_of(recipe, ROWS)(step)
    ]
    single = recipe.model_copy(update={"data": make_recipe().data})
    trainer = Trainer(MultiAdapterModel(exact_model()))
    trainer.join("0", single, drawn)
    trainer._preparation._learners["0"].draw = lambda step: list(range(8 * step, 8 * step + 8))
    assert largest_difference(ours, trained(trainer)) <= 1e-12


@pytest.mark.parametrize("micro_batch_tokens", [20, 100])
def test_micro_batches_and_neighbours_change_nothing(micro_batch_tokens: int) -> None:
    recipe = mixture(PretrainObjective(), PairObjective())
    alone = trained(joined(recipe))
    small = mixture(PretrainObjective(), PairObjective(), micro_batch_tokens=micro_batch_tokens)
    other = mixture(SftObjective(), SftObjective(), weights=(0.1, 0.9), seed=9)
    assert largest_difference(alone, trained(joined(small))) <= 1e-10
    assert largest_difference(alone, trained(joined(recipe, other))) <= 1e-10


def test_a_mixture_goes_on_from_its_state_as_if_never_interrupted() -> None:
    recipe = mixture(PretrainObjective(), PairObjective())
    first = joined(recipe)
    for _ in range(3):
        first.step()
    second = Trainer(MultiAdapterModel(exact_model()))
    second.join("0", recipe, ROWS, state=first.state("0"))
    assert largest_difference(trained(joined(recipe)), trained(second)) <= 1e-12


def test_a_step_without_rows_of_a_part_has_no_figure_of_it() -> None:
    recipe = mixture(PretrainObjective(), PairObjective(), weights=(0.999, 0.001), steps=1)
    assert {ROWS[at].part for at in draw_of(recipe, ROWS)(0)} == {"a"}
    report = joined(recipe).step()["0"]
    assert set(report.figures) == {"a/loss"}
    assert report.is_finite


def test_a_part_without_rows_is_refused_by_name() -> None:
    with pytest.raises(DataError, match="no training rows of source 'b'"):
        draw_of(mixture(SftObjective(), SftObjective()), ROWS[:10])


def test_what_one_objective_needs_the_mixture_needs() -> None:
    class ComparingObjective(SftObjective):
        needs: ClassVar[frozenset[str]] = frozenset({"reference"})

    assert MixedObjective({"a": SftObjective(), "b": ComparingObjective()}).needs == {"reference"}
    assert MixedObjective({"a": SftObjective()}).needs == set()
