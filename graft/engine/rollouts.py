"""Rollouts: answers that slots in training give, what they earn, and what is learned of them.

All slots that are due sample together in one generator. What comes out depends on the seed, the
step, the row and the weights alone, up to rounding: packing, workers and resumes do not change it.
"""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from graft.core.errors import GraftError, TrainingError
from graft.core.seeds import derive_seed
from graft.data.records import EvalPrompt, TokenRow
from graft.engine.answers import SampledAnswer, sample_answers
from graft.engine.generate import GenerationRequest
from graft.engine.kv_cache import require_full_attention
from graft.engine.measurable import require_answers_fit
from graft.engine.reward_models import RewardModels, answer_outcomes
from graft.engine.scoring import RowScores, outputs_of, read_rows
from graft.metrics.rewards import RewardScores, add_up, reward_names, score_rewards
from graft.models.rope import short_context
from graft.objectives.base import DETAILS, REFERENCE

if TYPE_CHECKING:
    from graft.data.template import ChatTemplate
    from graft.engine.backends.base import Backend
    from graft.engine.multi import MultiAdapterModel
    from graft.engine.reference import References
    from graft.methods.base import Method
    from graft.metrics.base import RowOutcome
    from graft.metrics.rewards import Reward
    from graft.objectives.sampling import SamplingObjective
    from graft.recipe.sections import TrainSection


@dataclass(frozen=True)
class Prompts:
    """What a slot is asked in a step."""

    objective: SamplingObjective
    rows: Sequence[TokenRow]
    settings: TrainSection
    step: int
    """Steps done before."""


@dataclass(frozen=True)
class Rollout:
    """What came of it."""

    rows: list[TokenRow]
    """One a prompt, the answers as branches, with all that the objective's loss reads."""
    figures: dict[str, float]
    """Mean reward and length; under `rollout/` each metric's mean and deviation, and the share of
    answers that were cut."""


class Rollouts:
    """Samples for the slots of a trainer.

    Args:
        model: Holds the slots.
        backend: Of the training.
        references: Of the slots.
        template: Of the base; None where no objective samples.
        judges: Reward models that objectives ask.
    """

    def __init__(
        self,
        model: MultiAdapterModel,
        backend: Backend,
        references: References,
        template: ChatTemplate | None,
        judges: RewardModels | None,
    ) -> None:
        self._model = model
        self._backend = backend
        self._references = references
        self._known_template = template
        self._judges = judges
        self.seconds = 0.0
        """What the last call of `sample` took."""

    @property
    def _template(self) -> ChatTemplate:
        if self._known_template is None:
            raise TrainingError(
                "the objective samples answers, and the trainer was given no chat template; make "
                "it as Trainer(model, backend, template)"
            )
        return self._known_template

    def join(self, objective: SamplingObjective, method: Method, rows: Sequence[TokenRow]) -> None:
        """Sees to it that a slot can sample; called before it is on the base.

        Raises:
            DataError: Prompt and answer are longer than the model's context; the row is named.
            ModelError: The base has layers that do not attend to all earlier tokens.
            TrainingError: There is no chat template.
        """
        require_full_attention(
            self._model.base,
            f"objective {objective.type} samples with full attention only: choose a base without "
            "them, or an objective that learns from given answers",
        )
        limits = [self._template.context_tokens]
        config = self._model.base.config
        limits.append(getattr(config, "max_position_embeddings", limits[0]))
        limits.append(short_context(config) or limits[0])
        require_answers_fit(objective, method, map(_asked, rows), min(limits))
        if self._judges is not None:
            self._judges.seat(reward.metric for reward in objective.rewards)

    def sample(self, asked: Mapping[str, Prompts]) -> dict[str, Rollout | GraftError]:
        """Has every slot answer its prompts; every worker calls it alike.

        Returns:
            Of each slot its rollout, or what is wrong with it: logits that are not finite, a reward
            that raises, gives no number or refuses a row.
        """
        self.seconds, started = 0.0, time.perf_counter()
        if not asked:
            return {}
        self._model.weights_changed()
        requests = [
            request
            for name, prompts in asked.items()
            for position, row in enumerate(prompts.rows)
            for request in self._requests(name, prompts, position, row)
        ]
        answers = iter(
            sample_answers(self._model, self._template.tokenizer, self._backend, requests)
        )
        found: dict[str, Rollout | GraftError] = {}
        for name, prompts in asked.items():
            size = prompts.objective.group_size
            groups = [[next(answers) for _ in range(size)] for _ in prompts.rows]
            try:
                found[name] = self._rollout(name, prompts, groups)
            except GraftError as error:  # its neighbours go on
                found[name] = error
        self.seconds = time.perf_counter() - started
        return found

    def _requests(
        self, name: str, prompts: Prompts, position: int, row: TokenRow
    ) -> list[GenerationRequest]:
        objective, seed = prompts.objective, prompts.settings.seed
        return [
            GenerationRequest(
                _asked(row).prompt_ids,
                slot=name,
                max_new_tokens=objective.max_new_tokens,
                temperature=objective.temperature,
                top_p=objective.top_p,
                stop_ids=self._template.stop_ids,
                seed=derive_seed("rollout", seed, prompts.step, position, sample),
            )
            for sample in range(objective.group_size)
        ]

    def _rollout(self, name: str, prompts: Prompts, groups: list[list[SampledAnswer]]) -> Rollout:
        objective, max_tokens = prompts.objective, prompts.settings.micro_batch_tokens
        _require_whole(name, prompts.rows, groups)
        earned = self._earned(objective, prompts.rows, groups)
        rows = [_joined(row, group) for row, group in zip(prompts.rows, groups, strict=True)]
        temperature = objective.temperature
        known = {}
        if objective.reads_reference:
            known[REFERENCE] = self._references.scores(
                name, rows, max_tokens=max_tokens, keeps=False, temperature=temperature
            )
        read = RowScores([array("d", [math.nan]) * len(row.targets) for row in rows], None)
        if objective.reads_own_answers:
            read = read_rows(
                self._model,
                name,
                rows,
                backend=self._backend,
                max_tokens=max_tokens,
                temperature=temperature,
            )
        outputs = outputs_of(rows, read.logprobs, known, read.values)
        rewards_NG = torch.tensor(earned.totals, dtype=torch.float64).reshape(len(rows), -1)
        carried = objective.experience(outputs, rewards_NG)
        rows = carrying_rows(rows, {**outputs.extra, **carried})
        return Rollout(rows, _figures(earned, groups))

    def _earned(
        self,
        objective: SamplingObjective,
        rows: Sequence[TokenRow],
        groups: list[list[SampledAnswer]],
    ) -> RewardScores:
        said = [
            (_asked(row), answer.text)
            for row, group in zip(rows, groups, strict=True)
            for answer in group
        ]
        asked, texts = [prompt for prompt, _ in said], [text for _, text in said]
        metrics = [reward.metric for reward in objective.rewards]
        outcomes = answer_outcomes(metrics, asked, texts, self._judges)
        sources = [prompt.source for prompt in asked]
        if self._backend.world_size == 1:
            return score_rewards(objective.rewards, outcomes, sources)
        return self._earned_by_the_first(objective.rewards, outcomes, sources)

    def _earned_by_the_first(
        self, rewards: Sequence[Reward], outcomes: list[RowOutcome], sources: Sequence[str]
    ) -> RewardScores:
        """Lets one worker score for all: a reward may be random, or fail for one of them alone."""
        names, failure = reward_names(rewards), None
        told = torch.zeros(1 + len(names), len(outcomes), dtype=torch.float64)
        if self._backend.world_rank == 0:
            try:
                found = score_rewards(rewards, outcomes, sources).by_reward
                told[1:] = torch.tensor([found[name] for name in names], dtype=torch.float64)
            except GraftError as error:
                failure = error
                told[0] = 1
        told = self._backend.all_reduce_sum(told)
        if told[0].any():
            raise failure or TrainingError("a reward failed on the first worker, which says why")
        return add_up(rewards, dict(zip(names, told[1:].tolist(), strict=True)))


def _asked(row: TokenRow) -> EvalPrompt:
    assert row.asked is not None  # rows of a sampling objective ask something
    return row.asked


def _require_whole(name: str, rows: Sequence[TokenRow], groups: list[list[SampledAnswer]]) -> None:
    for row, group in zip(rows, groups, strict=True):
        if any(answer.is_broken for answer in group):
            raise TrainingError(
                f"{row.source}: {name!r} gives logits that are not finite while it answers; its "
                "weights are broken: a smaller train.lr may help"
            )


def _joined(row: TokenRow, group: list[SampledAnswer]) -> TokenRow:
    """Puts sampled answers behind their prompt; all of their tokens are targets."""
    ids = list(_asked(row).prompt_ids)
    branch = [0] * len(ids)
    for number, answer in enumerate(group, 1):
        ids += answer.token_ids
        branch += [number] * len(answer.token_ids)
    return row._replace(input_ids=ids, is_supervised=[of > 0 for of in branch], branch=branch)


def carrying_rows(
    rows: Sequence[TokenRow], of_positions: Mapping[str, torch.Tensor]
) -> list[TokenRow]:
    """Gives rows what was computed for all of their targets together, by name."""
    counts = [len(row.targets) for row in rows]
    split = {name: value.split(counts) for name, value in of_positions.items()}
    return [
        row._replace(extra={key: array("d", of[at].tolist()) for key, of in split.items()})
        for at, row in enumerate(rows)
    ]


def _figures(earned: RewardScores, groups: list[list[SampledAnswer]]) -> dict[str, float]:
    answers = [answer for group in groups for answer in group]
    lengths = [len(answer.token_ids) for answer in answers]
    figures = {"answer_tokens": sum(lengths) / len(lengths)}
    for name, scores in {"reward": earned.totals, **earned.by_reward}.items():
        told = torch.tensor(scores, dtype=torch.float64)
        figures[name if name == "reward" else DETAILS + name] = float(told.mean())
        figures[f"{DETAILS}{name}_std"] = float(told.std()) if len(scores) > 1 else 0.0
    figures[f"{DETAILS}truncated_fraction"] = sum(a.is_truncated for a in answers) / len(answers)
    return figures


def saved_rows(rows: Sequence[TokenRow]) -> dict[str, torch.Tensor]:
    """Returns rows with their answers as tensors; see `restored_rows`."""
    names = sorted({name for row in rows for name in row.extra or {}})
    return {
        "lengths": torch.tensor([len(row.input_ids) for row in rows]),
        "input_ids": torch.tensor([token for row in rows for token in row.input_ids]),
        "branch": torch.tensor([of for row in rows for of in row.branch or ()]),
        **{
            f"extra.{name}": torch.tensor(
                [value for row in rows for value in (row.extra or {})[name]], dtype=torch.float64
            )
            for name in names
        },
    }


def restored_rows(saved: Mapping[str, torch.Tensor], prompts: Sequence[TokenRow]) -> list[TokenRow]:
    """Puts saved answers behind the prompts that they were given to."""
    lengths = saved["lengths"].tolist()
    ids, branches = (saved[name].split(lengths) for name in ("input_ids", "branch"))
    rows = [
        prompt._replace(
            input_ids=own.tolist(), is_supervised=(branch > 0).tolist(), branch=branch.tolist()
        )
        for prompt, own, branch in zip(prompts, ids, branches, strict=True)
    ]
    carried = {key: value for key, value in saved.items() if key.startswith("extra.")}
    return carrying_rows(
        rows, {key.removeprefix("extra."): value for key, value in carried.items()}
    )
