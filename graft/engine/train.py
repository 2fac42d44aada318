"""The training loop: one step of every slot that is on the base.

The same loop trains a pack of trials, one adapter alone, and one worker's share under DeepSpeed. A
slot's
step loss is the sum of its token losses over its supervised tokens in the whole step, over all
micro-batches and workers; slots are summed, and since rows never mix, each slot's gradient is its
own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from pydantic import Field

from graft.core.errors import DataError, GraftError, TrainingError
from graft.core.model import StrictModel
from graft.data.records import TokenRow
from graft.engine.accumulate import SlotStep, SlotSums, accumulate
from graft.engine.backends.base import Backend, OptimizerState
from graft.engine.backends.torch import TorchBackend
from graft.engine.calibrate import input_moments
from graft.engine.loss_scale import LossScale, LossScaleState
from graft.engine.multi import AdapterTensors, MultiAdapterModel
from graft.engine.preparation import Preparation
from graft.engine.schedule import learning_rate
from graft.engine.trainable import require_trainable
from graft.methods.base import Method, by_site, split_head
from graft.methods.layerwise import LayerMethod
from graft.methods.whole import WholeMethod
from graft.objectives.base import DETAILS
from graft.recipe.sections import Recipe, TrainSection

if TYPE_CHECKING:
    from graft.data.template import ChatTemplate
    from graft.engine.reward_models import RewardModels


class StepReport(StrictModel):
    """What one step of one slot did."""

    step: int
    """Steps done, this one included."""
    loss: float
    """Before the update, per supervised token (per pair for preferences)."""
    lr: float
    grad_norm: float
    """Before clipping."""
    num_tokens: int
    """Tokens without padding, over all workers; a prompt that answers share counts once."""
    num_supervised_tokens: int
    seconds: float
    """Of the whole step, with all other slots in it."""
    is_finite: bool
    """False where loss or gradient is NaN or infinite; the slot was then not stepped."""
    is_finished: bool
    """All steps of the recipe are done."""
    failure: str | None = None
    """Why the step was not done at all: an answer that was sampled, or what it earns, is broken."""
    figures: dict[str, float] = Field(default_factory=dict)
    """What the objective tells of itself (`reward_accuracy`), means over the step's rows; of a
    rollout also `reward` and `answer_tokens`, and details under `rollout/`."""

    @property
    def headline(self) -> dict[str, float]:
        """The figures without the details of a rollout: for progress lines."""
        return {k: v for k, v in self.figures.items() if not k.startswith(DETAILS)}


@dataclass(frozen=True)
class SlotState:
    """Everything that a slot needs to go on elsewhere: whole tensors, no world size, no ZeRO stage.

    Data order and dropout are functions of the seed and the step, so the step is their whole state.
    """

    step: int
    tensors: AdapterTensors
    optimizer: OptimizerState
    memory: dict[str, torch.Tensor] = field(default_factory=dict)
    """What the method itself remembers of its steps."""
    rollout: dict[str, torch.Tensor] = field(default_factory=dict)
    """Sampled answers that are not learned to the end."""
    loss_scale: LossScaleState | None = None
    """Of an fp16 base."""


@dataclass
class _Job:
    method: Method
    settings: TrainSection
    trained: tuple[str, ...]
    """Names of its parameters that ask for gradients at some time."""
    step: int
    memory: dict[str, torch.Tensor]


class Trainer:
    """Trains the slots that joined, one step each at a time.

    Args:
        model: The base.
        backend: None steps with plain torch.
        template: Of the base; needed where an objective samples answers.
        judges: Reward models that objectives ask.
        keeps_lower_states: What layers below all slots make of rows is kept, where the backend has
            one process with whole weights.
    """

    def __init__(
        self,
        model: MultiAdapterModel,
        backend: Backend | None = None,
        template: ChatTemplate | None = None,
        judges: RewardModels | None = None,
        *,
        keeps_lower_states: bool = True,
    ) -> None:
        self.model = model
        self.backend: Backend = backend or TorchBackend()
        is_plain = self.backend.takes_lanes and self.backend.world_size == 1
        model.lower.switch(keeps_lower_states and is_plain)
        self._jobs: dict[str, _Job] = {}
        self._preparation = Preparation(model, self.backend, template, judges)
        self._loss_scale = LossScale(model.dtype)

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the slots in training."""
        return tuple(self._jobs)

    def join(
        self,
        name: str,
        recipe: Recipe,
        rows: Sequence[TokenRow],
        *,
        tensors: AdapterTensors | None = None,
        state: SlotState | None = None,
    ) -> None:
        """Puts a new slot on the base and trains it from the next step on.

        Args:
            name: Unique among the slots.
            recipe: Its method, objective and training settings.
            rows: Its training rows.
            tensors: Weights to start from, and an objective's reference; None draws them from
                `train.seed`, and the reference is the bare base.
            state: A checkpoint to continue from; it has the weights too.

        Raises:
            DataError: There are no rows, or a sampled answer would be longer than the context.
            AdapterError: The weights do not fit.
            ConfigError: There is no memory for a reference, or it trains on a GPU only.
        """
        if not rows:
            raise DataError("no training rows; data.train must have at least one")
        if name in self._jobs:
            raise TrainingError(f"a slot named {name!r} is already in training")
        require_trainable(recipe, self.model.device)
        has_head = any("values" in part.objective.needs for part in recipe.parts)
        bare = None if tensors is None else split_head(tensors)[0]
        self._preparation.join(name, recipe, rows, bare)
        tensors = state.tensors if state else tensors if has_head else bare
        try:
            self.model.add_slot(
                name,
                recipe.method,
                tensors=tensors,
                seed=recipe.train.seed,
                trainable=True,
                moments=self._moments(recipe.method, rows) if tensors is None else None,
                has_head=has_head,
            )
        except GraftError:
            self._preparation.leave(name)
            raise
        parameters = self.model.parameters(name)
        self._loss_scale.watch(parameters.values())
        self.backend.attach(name, parameters, recipe.train, recipe.method.lr_scale)
        if state is not None:
            self.backend.load_optimizer_state(name, state.optimizer)
            self._preparation.restore(name, state.step, state.rollout)
            if state.loss_scale is not None and not self._jobs:  # neighbours have found theirs
                self._loss_scale.restore(state.loss_scale)
        self._jobs[name] = _Job(
            recipe.method,
            recipe.train,
            trained=tuple(key for key, p in parameters.items() if p.requires_grad),
            step=state.step if state else 0,
            memory={k: v.to(self.model.device, copy=True) for k, v in state.memory.items()}
            if state
            else {},
        )

    def _moments(self, method: Method, rows: Sequence[TokenRow]) -> dict[str, torch.Tensor] | None:
        if not (isinstance(method, LayerMethod) and method.looks_at_inputs):
            return None
        sites = [site.name for site in method.sites(self.model.linears)]
        return input_moments(self.model, sites, rows)

    def leave(self, name: str) -> None:
        """Takes a slot off; its neighbours do not notice.

        Raises:
            TrainingError: No such slot is in training.
        """
        if name not in self._jobs:
            raise TrainingError(f"no slot named {name!r} is in training")
        del self._jobs[name]
        self.backend.detach(name)
        self.model.remove_slot(name)
        self._preparation.leave(name)

    def state(self, name: str) -> SlotState:
        """A copy of all that the slot needs to continue elsewhere.

        Under DeepSpeed every worker must call it.
        """
        job = self._jobs[name]
        return SlotState(
            job.step,
            by_site(self.backend.parameters(name)),
            self.backend.optimizer_state(name),
            {key: value.detach().cpu().clone() for key, value in job.memory.items()},
            self._preparation.state(name, job.step),
            self._loss_scale.state if self._loss_scale.is_on else None,
        )

    def step(self, names: Collection[str] | None = None) -> dict[str, StepReport]:
        """Does one optimizer step of every named slot that has steps left; None means all."""
        started = time.perf_counter()
        active = {
            name: job
            for name, job in self._jobs.items()
            if job.step < job.settings.steps and (names is None or name in names)
        }
        if not active:
            return {}
        for name, job in active.items():
            self._pick_trained(name, job)
        made = self._preparation.steps({name: job.step for name, job in active.items()})
        taken = {name: step for name, step in made.items() if isinstance(step, SlotStep)}
        reports = {
            name: self._failed(active.pop(name), error)
            for name, error in made.items()
            if isinstance(error, GraftError)
        }
        if not active:
            return reports
        lrs = {name: learning_rate(job.settings, job.step) for name, job in active.items()}
        sums, norms = self._learn(active, taken, lrs)
        seconds = time.perf_counter() - started
        for name, job in active.items():
            job.step += 1
            norm = norms.get(name, math.nan)
            reports[name] = StepReport(
                step=job.step,
                loss=sums[name].loss,
                lr=lrs[name],
                grad_norm=norm,
                num_tokens=sum(len(r.row.input_ids) for r in taken[name].rows),
                num_supervised_tokens=sum(sum(r.row.is_supervised) for r in taken[name].rows),
                seconds=seconds,
                is_finite=math.isfinite(sums[name].loss) and math.isfinite(norm),
                is_finished=job.step >= job.settings.steps,
                figures=sums[name].figures | self._preparation.told(name),
            )
        return reports

    def _learn(
        self, active: dict[str, _Job], taken: dict[str, SlotStep], lrs: dict[str, float]
    ) -> tuple[dict[str, SlotSums], dict[str, float]]:
        """Runs forward, backward and update; again where a scaled gradient has overflowed.

        A slot that no factor helps is broken itself, and leaves its neighbours the one they need.
        """
        sums: dict[str, SlotSums] = {}
        norms: dict[str, float] = {}
        jobs, needed = active, self._loss_scale.state
        while True:
            sums |= accumulate(
                self.model,
                self.backend,
                {name: taken[name] for name in jobs},
                partial(self._regularization, jobs),
                self._loss_scale.factor,
            )
            finite = {name: lrs[name] for name in jobs if math.isfinite(sums[name].loss)}
            norms |= self.backend.step(
                finite,
                {name: job.settings.max_grad_norm for name, job in jobs.items()},
                self._after_step,
            )
            jobs = {name: jobs[name] for name in finite if not math.isfinite(norms[name])}
            if len(jobs) < len(finite):
                needed = self._loss_scale.state
            if not jobs or not self._loss_scale.lower():
                break
        self._loss_scale.restore(needed)
        self._loss_scale.passed()
        return sums, norms

    def _failed(self, job: _Job, error: GraftError) -> StepReport:
        job.step += 1
        return StepReport(
            step=job.step,
            loss=math.nan,
            lr=learning_rate(job.settings, job.step - 1),
            grad_norm=math.nan,
            num_tokens=0,
            num_supervised_tokens=0,
            seconds=0.0,
            is_finite=False,
            is_finished=job.step >= job.settings.steps,
            failure=str(error),
        )

    def _pick_trained(self, name: str, job: _Job) -> None:
        """Lets only what the method trains in this step ask for gradients: the rest stays still."""
        if not isinstance(job.method, WholeMethod):
            return
        parameters = self.model.parameters(name)
        trained = job.method.trained_at(job.trained, job.step, job.settings.seed)
        for key in job.trained:
            parameters[key].requires_grad_(key in trained)

    def _after_step(self, name: str) -> None:
        """Lets a method act on its own tensors once the optimizer has; gradients still stand."""
        job = self._jobs[name]
        if not (isinstance(job.method, LayerMethod) and job.method.acts_after_step):
            return
        parameters = self._method_tensors(name)
        gradients = {
            site: {key: p.grad for key, p in of_site.items() if p.grad is not None}
            for site, of_site in parameters.items()
        }
        with torch.no_grad():
            job.method.after_step(
                parameters,
                {site: of_site for site, of_site in gradients.items() if of_site},
                job.memory,
                job.step + 1,
                job.settings.steps,
            )

    def _method_tensors(self, name: str) -> AdapterTensors:
        """A slot's parameters without its head, which is none of the method's."""
        return split_head(by_site(dict[str, torch.Tensor](self.model.parameters(name))))[0]

    def _regularization(self, active: dict[str, _Job]) -> torch.Tensor | None:
        """What methods add to the loss of a step, this worker's share."""
        found = [
            job.method.regularization(self._method_tensors(name))
            for name, job in active.items()
            if isinstance(job.method, LayerMethod) and job.method.regularizes
        ]
        terms = [term for term in found if term is not None]
        return torch.stack(terms).sum() / self.backend.world_size if terms else None
