"""What a step needs before its gradient pass, beside the rows themselves."""

from __future__ import annotations

from graft.data.records import TokenRow
from graft.engine.accumulate import SlotStep
from graft.engine.backends.base import Backend
from graft.engine.batches import RoutedRow
from graft.engine.mixture import MixedObjective, StepObjective
from graft.engine.multi import MultiAdapterModel
from graft.engine.reference import References
from graft.engine.scoring import outputs_of, score_rows
from graft.objectives.base import REFERENCE
from graft.recipe.sections import TrainSection


class Preparation:
    """Makes ready what slots take in a step; nothing here takes gradients.

    Args:
        model: Holds the slots.
        backend: Of the training.
    """

    def __init__(self, model: MultiAdapterModel, backend: Backend) -> None:
        self._model = model
        self._backend = backend
        self.references = References(model, backend)

    def slot_step(
        self,
        name: str,
        objective: StepObjective,
        settings: TrainSection,
        rows: list[TokenRow],
        step: int,
    ) -> SlotStep:
        """Gives rows what their objective needs beside them; every worker calls it alike.

        Args:
            name: The slot's.
            objective: Learns from the rows.
            settings: Of the training.
            rows: All of the step.
            step: Steps done before.
        """
        if isinstance(objective, MixedObjective):
            objective = objective.for_step(rows)
        max_tokens = settings.micro_batch_tokens
        statistics = self._statistics(name, objective, rows, max_tokens)
        if "reference" in objective.needs:
            found = self.references.scores(name, rows, max_tokens=max_tokens)
            rows = [
                row._replace(extra={**(row.extra or {}), REFERENCE: scores})
                for row, scores in zip(rows, found, strict=True)
            ]
        routed = [RoutedRow(name, row, at) for at, row in enumerate(rows)]
        return SlotStep(objective, routed, settings.seed, step, max_tokens, statistics)

    def _statistics(
        self, name: str, objective: StepObjective, rows: list[TokenRow], max_tokens: int
    ) -> dict[str, float]:
        context = getattr(self._model.base.config, "max_position_embeddings", None)
        probes = [
            row if context is None else row.take(list(range(len(row.input_ids)))[:context])
            for row in objective.probe_rows(rows)
        ]
        if not probes:
            return {}
        self._model.weights_changed()
        logprobs = score_rows(
            self._model, name, probes, backend=self._backend, max_tokens=max_tokens
        )
        extra = {}
        if "reference" in objective.needs:
            extra[REFERENCE] = self.references.scores(
                name, probes, max_tokens=max_tokens, keeps=False
            )
        return objective.statistics(outputs_of(probes, logprobs, extra))
