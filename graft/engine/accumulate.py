"""The gradient pass of one step: every slot's rows, in micro-batches, divided between workers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from graft.engine.backends.base import Backend
from graft.engine.batches import MicroBatch, RoutedRow, micro_batches
from graft.engine.logprobs import read_positions, slot_outputs
from graft.engine.mixture import StepObjective
from graft.engine.multi import MultiAdapterModel
from graft.methods.routing import DropoutStream


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
) -> dict[str, SlotSums]:
    """Runs forward and backward over this worker's rows.

    Args:
        model: Holds the slots.
        backend: Takes the gradients.
        steps: By slot.
        regularization: Gives a term of the step's loss beside the rows', this worker's share.
    """
    everyone = [routed for step in steps.values() for routed in step.rows]
    everyone.sort(key=lambda r: (-len(r.row.input_ids), str(r.slot), r.position))
    max_tokens = max(step.max_tokens for step in steps.values())

    def batched(rows: list[RoutedRow]) -> list[MicroBatch]:
        return micro_batches(rows, max_tokens, model.device, shares_prompts=model.shares_prompts)

    def stream(name: str, rows: torch.Tensor) -> DropoutStream:
        return DropoutStream(steps[name].seed, steps[name].step, rows)

    batches = batched(everyone[backend.world_rank :: backend.world_size])
    num_runs = backend.forward_backward_count(len(batches))
    idle = batched(everyone[-1:])[0]
    weights = {name: step.weight for name, step in steps.items()}
    statistics = {name: step.statistics for name, step in steps.items()}
    temperatures = {name: step.temperature for name, step in steps.items()}
    with_entropy = any("entropy" in step.objective.needs for step in steps.values())
    tally = _Tally()
    for run in range(num_runs):
        is_idle = run >= len(batches)
        batch = idle if is_idle else batches[run]
        positions = read_positions(
            model, batch, stream, temperatures=temperatures, with_entropy=with_entropy
        )
        losses = []
        for name, outputs in slot_outputs(model, batch, positions, statistics).items():
            total = steps[name].objective.loss(outputs).sum()
            losses.append(total / weights[name])
            with torch.no_grad():
                figures = steps[name].objective.figures(outputs)
            tally.add(name, float(total.detach()) / weights[name], figures, is_idle=is_idle)
        loss = torch.stack(losses).sum()
        # An idle worker runs along with weight 0: collectives inside the model need everyone.
        loss = loss * 0.0 if is_idle else loss
        if run == 0 and (extra := regularization()) is not None:
            loss = loss + extra
        backend.backward(loss, is_last=run == num_runs - 1)
    return tally.over(backend, list(steps))


class _Tally:
    """Sums up losses and figures, first here and then over the workers."""

    def __init__(self) -> None:
        self._losses: dict[str, float] = defaultdict(float)
        self._sums: dict[tuple[str, str], float] = defaultdict(float)
        self._counts: dict[tuple[str, str], int] = defaultdict(int)

    def add(
        self, slot: str, loss: float, figures: Mapping[str, torch.Tensor], *, is_idle: bool
    ) -> None:
        """Counts a micro-batch in; of an idle one the figures' names alone."""
        self._losses[slot] += 0.0 if is_idle else loss
        for name, of_rows in figures.items():
            known = of_rows[:0] if is_idle else of_rows[~of_rows.isnan()]
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
