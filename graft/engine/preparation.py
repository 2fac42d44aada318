"""What a step needs before its gradient pass: its rows, and what they are to carry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from graft.core.errors import GraftError
from graft.data.records import TokenRow
from graft.engine.accumulate import SlotStep
from graft.engine.backends.base import Backend
from graft.engine.batches import RoutedRow
from graft.engine.mixture import Draw, MixedObjective, StepObjective, draw_of, objective_of
from graft.engine.multi import AdapterTensors, MultiAdapterModel
from graft.engine.reference import References
from graft.engine.rollouts import Prompts, Rollouts, restored_rows, saved_rows
from graft.engine.scoring import outputs_of, score_rows
from graft.objectives.base import REFERENCE, ROLLOUT_SECONDS
from graft.objectives.sampling import SamplingObjective
from graft.recipe.sections import Recipe, TrainSection

if TYPE_CHECKING:
    from graft.data.template import ChatTemplate
    from graft.engine.reward_models import RewardModels


@dataclass
class _Learner:
    """What a slot learns from."""

    objective: StepObjective
    draw: Draw
    settings: TrainSection
    rows: Sequence[TokenRow]
    sampled: list[TokenRow] = field(default_factory=list)
    """Prompts with the slot's own answers, where those are learned."""
    told: dict[str, float] = field(default_factory=dict)
    """What was told of the rollout of the last step."""

    def num_iterations(self) -> int:
        """Steps on the same rows."""
        objective = self.objective
        return objective.num_iterations if isinstance(objective, SamplingObjective) else 1

    def drawn(self, step: int) -> list[TokenRow]:
        """Rows of a step, or those that its answers are sampled for."""
        return [self.rows[index] for index in self.draw(step // self.num_iterations())]


class Preparation:
    """Makes ready what slots take in a step; nothing here takes gradients.

    Args:
        model: Holds the slots.
        backend: Of the training.
        template: Of the base; needed where an objective samples.
        judges: Reward models that objectives ask.
    """

    def __init__(
        self,
        model: MultiAdapterModel,
        backend: Backend,
        template: ChatTemplate | None,
        judges: RewardModels | None,
    ) -> None:
        self._model = model
        self._backend = backend
        self._references = References(model, backend)
        self._rollouts = Rollouts(model, backend, self._references, template, judges)
        self._learners: dict[str, _Learner] = {}

    def join(
        self, name: str, recipe: Recipe, rows: Sequence[TokenRow], start: AdapterTensors | None
    ) -> None:
        """Takes a slot's rows; called before the slot itself is on the base.

        Args:
            name: The slot's.
            recipe: Its objectives and settings.
            rows: Its training rows.
            start: Its reference; None is the bare base.

        Raises:
            DataError: A source has no rows, or an answer would be longer than the context.
            ConfigError: There is no memory for a reference.
            AdapterError: The reference does not fit.
        """
        objective = objective_of(recipe)
        learner = _Learner(objective, draw_of(recipe, rows), recipe.train, rows)
        if isinstance(objective, SamplingObjective):
            self._rollouts.join(objective, recipe.method, rows)
        is_asked = not isinstance(objective, SamplingObjective) or objective.reads_reference
        if "reference" in objective.needs and is_asked:
            self._references.join(name, recipe.method, start)
        self._learners[name] = learner

    def leave(self, name: str) -> None:
        """Forgets a slot."""
        self._learners.pop(name, None)
        self._references.leave(name)

    def restore(self, name: str, step: int, rollout: Mapping[str, torch.Tensor]) -> None:
        """Takes back what `state` gave, at the same step."""
        if rollout:
            learner = self._learners[name]
            learner.sampled = restored_rows(rollout, learner.drawn(step))

    def state(self, name: str, step: int) -> dict[str, torch.Tensor]:
        """Sampled answers that are not learned to the end; empty where there are none."""
        learner = self._learners[name]
        return saved_rows(learner.sampled) if step % learner.num_iterations() else {}

    def steps(self, steps: Mapping[str, int]) -> dict[str, SlotStep | GraftError]:
        """Makes each slot's part of a step, or says why it has none; every worker calls it alike.

        Args:
            steps: Slots that take part, with the steps that they have done.

        Returns:
            The error of a slot whose sampled answers, or what they earn, are broken: others do not
            notice.
        """
        failed = self._roll_out(steps)
        return {name: failed.get(name) or self._slot_step(name, steps[name]) for name in steps}

    def told(self, name: str) -> dict[str, float]:
        """What is told of a slot's rollout in the last step, and how long that took."""
        learner = self._learners[name]
        if not isinstance(learner.objective, SamplingObjective):
            return {}
        return {**learner.told, ROLLOUT_SECONDS: self._rollouts.seconds if learner.told else 0.0}

    def _roll_out(self, steps: Mapping[str, int]) -> dict[str, GraftError]:
        """Has answers sampled for all slots that are through with their last ones."""
        asked = {}
        for name, step in steps.items():
            learner = self._learners[name]
            learner.told = {}
            objective = learner.objective
            if isinstance(objective, SamplingObjective) and step % objective.num_iterations == 0:
                asked[name] = Prompts(objective, learner.drawn(step), learner.settings, step)
        failed = {}
        for name, rollout in self._rollouts.sample(asked).items():
            if isinstance(rollout, GraftError):
                failed[name] = rollout
                continue
            learner = self._learners[name]
            learner.sampled, learner.told = rollout.rows, rollout.figures
        return failed

    def _slot_step(self, name: str, step: int) -> SlotStep:
        learner = self._learners[name]
        objective, settings = learner.objective, learner.settings
        max_tokens, temperature = settings.micro_batch_tokens, 1.0
        rows = learner.drawn(step)
        if isinstance(objective, MixedObjective):
            objective = objective.for_step(rows)
        statistics = self._statistics(name, objective, rows, max_tokens)
        if isinstance(objective, SamplingObjective):
            rows, temperature = learner.sampled, objective.temperature
        elif "reference" in objective.needs:
            found = self._references.scores(name, rows, max_tokens=max_tokens)
            rows = [
                row._replace(extra={**(row.extra or {}), REFERENCE: scores})
                for row, scores in zip(rows, found, strict=True)
            ]
        routed = [RoutedRow(name, row, at) for at, row in enumerate(rows)]
        return SlotStep(objective, routed, settings.seed, step, max_tokens, statistics, temperature)

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
            extra[REFERENCE] = self._references.scores(
                name, probes, max_tokens=max_tokens, keeps=False
            )
        return objective.statistics(outputs_of(probes, logprobs, extra))
