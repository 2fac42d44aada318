"""A mixture in training: which rows each step draws, and several objectives learned as one.

Sources of one objective share its denominator, as if their rows stood in one file. Different
objectives have losses of different units (tokens, pairs), so each is averaged over its own rows of
the step, and these means are averaged by how many rows they are of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Protocol

import torch

from graft.core.errors import DataError
from graft.data.records import TokenRow
from graft.engine.order import batch_rows, mixed_rows
from graft.objectives.base import Objective, TokenOutputs
from graft.recipe.mixture import DataMixture
from graft.recipe.sections import Recipe

Draw = Callable[[int], list[int]]
"""Step → indices of the rows that it takes."""


class StepObjective(Protocol):
    """What a step asks of its objective; see `Objective` for each."""

    @property
    def needs(self) -> frozenset[str]:
        """What the engine must compute beside log-probabilities."""

    def row_weight(self, row: TokenRow) -> float:
        """Returns what a row adds to the denominator."""

    def probe_rows(self, rows: list[TokenRow]) -> list[TokenRow]:
        """Returns rows to score before the step."""

    def statistics(self, probes: TokenOutputs) -> dict[str, float]:
        """Sums up the whole step."""

    def loss(self, outputs: TokenOutputs) -> torch.Tensor:
        """Returns each row's summed loss."""

    def figures(self, outputs: TokenOutputs) -> dict[str, torch.Tensor]:
        """Tells how training goes."""


def objective_of(recipe: Recipe) -> Objective | MixedObjective:
    """Returns what a recipe's rows are learned by."""
    if not isinstance(recipe.data, DataMixture):
        return recipe.objective
    return MixedObjective({part.name: part.objective for part in recipe.parts})


def draw_of(recipe: Recipe, rows: Sequence[TokenRow]) -> Draw:
    """Returns the order of a recipe's rows: a function of the seed and the step.

    Raises:
        DataError: A source of the mixture has no rows.
    """
    train, parts = recipe.train, recipe.parts
    if not isinstance(recipe.data, DataMixture):
        return lambda step: batch_rows(train.seed, step, train.batch_size, len(rows))
    found = [[at for at, row in enumerate(rows) if row.part == part.name] for part in parts]
    if empty := [part.name for part, own in zip(parts, found, strict=True) if not own]:
        raise DataError(f"no training rows of source {empty[0]!r}; each source must have one")
    sizes, weights = [len(own) for own in found], [part.weight for part in parts]

    def draw(step: int) -> list[int]:
        drawn = mixed_rows(train.seed, step, train.batch_size, sizes, weights)
        return [found[source][row] for source, row in drawn]

    return draw


@dataclass(frozen=True)
class MixedObjective:
    """Objectives by part of the data; each row is learned by its part's."""

    parts: Mapping[str, Objective]
    shares: Mapping[str, float] = field(default_factory=dict)
    """Of a step: each part in it → its rows over their summed row weight."""
    factors: Mapping[Objective, float] = field(default_factory=dict)
    """Of a step: each objective in it → its rows over their summed row weight."""

    @property
    def needs(self) -> frozenset[str]:
        """What any of the objectives needs."""
        return frozenset().union(*(objective.needs for objective in self.parts.values()))

    def for_step(self, rows: Sequence[TokenRow]) -> MixedObjective:
        """Returns itself with the denominators of one step.

        Args:
            rows: All rows of the step, of all micro-batches and workers.
        """

        def per_weight(objective: Objective, names: Sequence[str]) -> float:
            own = [row for row in rows if row.part in names]
            return len(own) / sum(objective.row_weight(row) for row in own)

        present = {row.part for row in rows}
        return replace(
            self,
            shares={
                name: per_weight(objective, [name])
                for name, objective in self.parts.items()
                if name in present
            },
            factors={
                objective: per_weight(objective, names)
                for objective, names in self._objectives.items()
                if present & set(names)
            },
        )

    def row_weight(self, row: TokenRow) -> float:
        """Counts rows: the loss is a mean over each objective's own denominator already."""
        return 1.0

    def probe_rows(self, rows: list[TokenRow]) -> list[TokenRow]:
        """Returns the probe rows of every objective, marked as its own."""
        return [
            probe._replace(part=names[0])
            for objective, names in self._objectives.items()
            if (own := [row for row in rows if row.part in names])
            for probe in objective.probe_rows(own)
        ]

    def statistics(self, probes: TokenOutputs) -> dict[str, float]:
        """Returns the numbers of every objective, under the name of its first part."""
        return {
            f"{names[0]}/{key}": value
            for objective, names in self._objectives.items()
            for own in [_of_parts(probes, names)]
            if own.rows
            for key, value in objective.statistics(own).items()
        }

    def loss(self, outputs: TokenOutputs) -> torch.Tensor:
        """Returns each row's loss by its own objective, in units of rows."""
        losses = outputs.logprobs_P.new_zeros(outputs.num_rows)
        for objective, names in self._objectives.items():
            at = _rows_at(outputs, names)
            if at.numel():
                own = objective.loss(self._own(outputs, names))
                losses = losses.index_copy(0, at, own * self.factors[objective])
        return losses

    def figures(self, outputs: TokenOutputs) -> dict[str, torch.Tensor]:
        """The loss of each part in the step, per its own token or pair, and its own figures."""
        found = {}
        for name, share in self.shares.items():
            objective, own = self.parts[name], self._own(outputs, [name])
            told = {"loss": objective.loss(own) * share, **objective.figures(own)}
            for key, of_rows in told.items():
                nothing = of_rows.new_full((outputs.num_rows,), float("nan"))
                at = _rows_at(outputs, [name])
                found[f"{name}/{key}"] = nothing.index_copy(0, at, of_rows)
        return found

    @property
    def _objectives(self) -> dict[Objective, list[str]]:
        """Different objectives, and the parts that each learns."""
        found: dict[Objective, list[str]] = {}
        for name, objective in self.parts.items():
            found.setdefault(objective, []).append(name)
        return found

    def _own(self, outputs: TokenOutputs, names: Sequence[str]) -> TokenOutputs:
        """Outputs of some parts, with their objective's own statistics."""
        first = self._objectives[self.parts[names[0]]][0] + "/"
        statistics = {
            key.removeprefix(first): value
            for key, value in outputs.statistics.items()
            if key.startswith(first)
        }
        return replace(_of_parts(outputs, names), statistics=statistics)


def _rows_at(outputs: TokenOutputs, names: Sequence[str]) -> torch.Tensor:
    at = [index for index, row in enumerate(outputs.rows) if row.part in names]
    return torch.tensor(at, dtype=torch.long, device=outputs.row_P.device)


def _of_parts(outputs: TokenOutputs, names: Sequence[str]) -> TokenOutputs:
    """Cuts the rows of some parts out of the outputs."""
    is_own_R = torch.tensor([row.part in names for row in outputs.rows], dtype=torch.bool)
    is_own_R = is_own_R.to(outputs.row_P.device)
    is_own_P = is_own_R[outputs.row_P]
    kept = {
        name: value[is_own_P]
        for name in (f.name for f in fields(outputs) if f.name.endswith("_P"))
        if (value := getattr(outputs, name)) is not None
    }
    number_R = is_own_R.cumsum(0) - 1
    return replace(
        outputs,
        **{**kept, "row_P": number_R[kept["row_P"]]},
        rows=tuple(row for row in outputs.rows if row.part in names),
        extra={name: value[is_own_P] for name, value in outputs.extra.items()},
    )
