"""The gradient pass of one step: every slot's rows, in micro-batches, divided between workers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from graft.engine.backends.base import Backend
from graft.engine.batches import MicroBatch, RoutedRow
from graft.engine.lanes import Lanes, divide, run_in_lanes
from graft.engine.logprobs import read_positions, slot_outputs
from graft.engine.lower_states import batches_of
from graft.engine.mixture import StepObjective
from graft.engine.multi import MultiAdapterModel
from graft.engine.reading import keep_lower_states
from graft.methods.routing import DropoutStream
from graft.objectives.sampling import SamplingObjective


@dataclass(frozen=True)
class SlotStep:
    """One slot's part of a step."""

    objective: StepObjective
    rows: Sequence[RoutedRow]
    seed: int
    """Of dropout."""
    step: int
    max_tokens: int
    """Padded tokens of one forward pass."""
    statistics: Mapping[str, float] = field(default_factory=dict)
    temperature: float = 1.0
    """Of the distributions whose log-probabilities are learned."""

    @property
    def rows_come_again(self) -> bool:
        """They are rows of the data; sampled answers are new at every rollout."""
        return not isinstance(self.objective, SamplingObjective)

    @property
    def weight(self) -> float:
        """Denominator of its loss, over all micro-batches and workers."""
        return sum(self.objective.row_weight(routed.row) for routed in self.rows)


@dataclass
class SlotSums:
    """What a step came to for one slot, over all its rows and workers."""

    loss: float = 0.0
    figures: dict[str, float] = field(default_factory=dict)
    """Means over the rows that they concern; a figure that concerns none is left out."""


def accumulate(
    model: MultiAdapterModel,
    backend: Backend,
    steps: Mapping[str, SlotStep],
    regularization: Callable[[], torch.Tensor | None],
    loss_scale: float = 1.0,
) -> dict[str, SlotSums]:
    """Runs forward and backward over this worker's rows.

    Args:
        model: Holds the slots.
        backend: Takes the gradients.
        steps: By slot.
        regularization: Gives a term of the step's loss beside the rows', this worker's share.
        loss_scale: Factor on what goes backward; losses are told without it.
    """
    everyone = [routed for step in steps.values() for routed in step.rows]
    everyone.sort(key=lambda r: (-len(r.row.input_ids), str(r.slot), r.position))
    max_tokens = max(step.max_tokens for step in steps.values())
    has_lanes = backend.takes_lanes and backend.world_size == 1 and not model.is_owned
    num_tokens = sum(len(routed.row.input_ids) for routed in everyone)
    lanes = divide(num_tokens, max_tokens, model.device) if has_lanes else Lanes(1, max_tokens)
    lasting = [step for step in steps.values() if step.rows_come_again]
    rows_again = [routed.row for step in lasting for routed in step.rows]
    keep_lower_states(model, rows_again, max_tokens)
    passes = _Passes(model, steps, loss_scale)
    own = everyone[backend.world_rank :: backend.world_size]
    batches = batches_of(model, own, lanes.max_tokens)
    tally = _Tally()
    if lanes.number > 1 and len(batches) > 1:
        losses = [partial(passes.run, batch) for batch in batches]
        losses[0] = partial(passes.run, batches[0], regularization)
        longest = max(batch.input_ids.shape[1] for batch in batches)
        for told in run_in_lanes(losses, passes.parameters, lanes=lanes.number, longest=longest):
            tally.add(told)
        return tally.over(backend, list(steps))
    num_runs = backend.forward_backward_count(len(batches))
    idle = batches_of(model, everyone[-1:], lanes.max_tokens)[0]
    for run in range(num_runs):
        is_idle = run >= len(batches)
        loss, told = passes.run(
            idle if is_idle else batches[run], regularization if run == 0 else None, is_idle=is_idle
        )
        tally.add(told)
        backend.backward(loss, is_last=run == num_runs - 1)
    return tally.over(backend, list(steps))


class _Told(NamedTuple):
    """What a micro-batch came to for one slot."""

    slot: str
    loss: float
    figures: Mapping[str, torch.Tensor]
    """By name, `[rows]`; NaN where a row is not concerned."""


class _Passes:
    """The forward passes of one step; independent of one another."""

    def __init__(
        self, model: MultiAdapterModel, steps: Mapping[str, SlotStep], loss_scale: float
    ) -> None:
        self._model, self._steps, self._loss_scale = model, steps, loss_scale
        self._weights = {name: step.weight for name, step in steps.items()}
        self._statistics = {name: step.statistics for name, step in steps.items()}
        self._temperatures = {name: step.temperature for name, step in steps.items()}
        self._with_entropy = any("entropy" in step.objective.needs for step in steps.values())

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that take gradients in this step."""
        found = [p for name in self._steps for p in self._model.parameters(name).values()]
        return [parameter for parameter in found if parameter.requires_grad]

    def run(
        self,
        batch: MicroBatch,
        regularization: Callable[[], torch.Tensor | None] | None = None,
        *,
        is_idle: bool = False,
    ) -> tuple[torch.Tensor, list[_Told]]:
        """Returns a micro-batch's part of the step's loss, and what it came to by slot.

        Args:
            batch: Its rows.
            regularization: Gives a term of the step's loss to be counted here.
            is_idle: Run along with weight 0: collectives inside the model need every worker.
        """
        positions = read_positions(
            self._model,
            batch,
            self._stream,
            temperatures=self._temperatures,
            with_entropy=self._with_entropy,
        )
        losses, told = [], []
        for name, outputs in slot_outputs(self._model, batch, positions, self._statistics).items():
            objective = self._steps[name].objective
            losses.append(objective.loss(outputs).sum() / self._weights[name])
            with torch.no_grad():
                figures = objective.figures(outputs)
            if is_idle:
                figures = {figure: of_rows[:0] for figure, of_rows in figures.items()}
            told.append(_Told(name, 0.0 if is_idle else float(losses[-1].detach()), figures))
        loss = torch.stack(losses).sum()
        loss = loss * 0.0 if is_idle else loss
        extra = regularization() if regularization is not None else None
        return self._loss_scale * (loss if extra is None else loss + extra), told

    def _stream(self, name: str, rows: torch.Tensor) -> DropoutStream:
        return DropoutStream(self._steps[name].seed, self._steps[name].step, rows)


class _Tally:
    """Sums up losses and figures, first here and then over the workers."""

    def __init__(self) -> None:
        self._losses: dict[str, float] = defaultdict(float)
        self._sums: dict[tuple[str, str], float] = defaultdict(float)
        self._counts: dict[tuple[str, str], int] = defaultdict(int)

    def add(self, told: Sequence[_Told]) -> None:
        """Counts a micro-batch in; of an idle one there are the figures' names alone."""
        for slot, loss, figures in told:
            self._losses[slot] += loss
            for name, of_rows in figures.items():
                known = of_rows[~of_rows.isnan()]
                self._sums[slot, name] += float(known.double().sum())
                self._counts[slot, name] += known.numel()

    def over(self, backend: Backend, slots: list[str]) -> dict[str, SlotSums]:
        """Sums over the workers; all have met the same names."""
        names = sorted(self._sums)
        values = [
            *(self._losses[slot] for slot in slots),
            *(self._sums[name] for name in names),
            *(self._counts[name] for name in names),
        ]
        summed = backend.all_reduce_sum(torch.tensor(values, dtype=torch.float64)).tolist()
        found = {slot: SlotSums(loss) for slot, loss in zip(slots, summed, strict=False)}
        sums, counts = summed[len(slots) :][: len(names)], summed[len(slots) + len(names) :]
        for (slot, name), total, count in zip(names, sums, counts, strict=True):
            if count:
                found[slot].figures[name] = total / count
        return found
