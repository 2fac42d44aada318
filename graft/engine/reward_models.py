"""Reward models that a recipe names: found before training, asked for the scores of answers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from graft.core.errors import AdapterError, DataError, ModelError, TrainingError
from graft.data.records import EvalPrompt, TokenRow
from graft.engine.answer_scores import answer_scores
from graft.metrics.base import Metric, RowOutcome
from graft.metrics.reward_model import RewardModelMetric
from graft.objectives._scored import scored_row
from graft.objectives.sampling import SamplingObjective

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from graft.compressors.base import Adapter
    from graft.data.template import ChatTemplate
    from graft.engine.multi import MultiAdapterModel
    from graft.models import ReadyModel
    from graft.recipe.sections import Recipe

_MODEL_FILE = "config.json"
_ADAPTER_FILE = "adapter_config.json"
_BATCH = 16


class _Judge(Protocol):
    """One reward model, loaded."""

    template: ChatTemplate

    def seat(self) -> None:
        """Takes its place on the base, where it has one there."""

    def scores(self, rows: list[TokenRow]) -> list[float]:
        """Scores rows of one prompt and one answer each."""


class RewardModels:
    """The reward models of the runs on one base.

    Args:
        model: The base; adapters are put on it when they are first needed.
        ready: The base's files.
        template: Of the base.
        home: Where adapters are.
    """

    def __init__(
        self, model: MultiAdapterModel, ready: ReadyModel, template: ChatTemplate, home: Path
    ) -> None:
        self._model = model
        self._ready = ready
        self._template = template
        self._home = home
        self._judges: dict[str, _Judge] = {}
        self._names: dict[str, str] = {}

    def load(self, recipe: Recipe) -> None:
        """Finds and checks what a recipe names; the base is not touched.

        Raises:
            AdapterError: No such adapter, no reward model, or one of another base.
            ModelError: A folder that is no sequence classifier of one output.
        """
        for source in _all_sources(recipe):
            if source not in self._judges:
                self._judges[source], self._names[source] = self._loaded(source, recipe)

    def facts(self, recipe: Recipe) -> dict[str, str]:
        """Says what each source stands for that a recipe's rewards name: a digest, or a folder."""
        return {source: self._names[source] for source in rewarding_sources(recipe)}

    def seat(self, metrics: Iterable[Metric]) -> None:
        """Puts reward models on the base that some metrics ask; by the thread that owns it."""
        for metric in metrics:
            if isinstance(metric, RewardModelMetric):
                self._judge(metric.source).seat()

    def scores(
        self, metrics: Iterable[Metric], asked: Sequence[EvalPrompt], answers: Sequence[str]
    ) -> list[dict[str, float]]:
        """Returns what every reward model among the metrics says of each answer, by source.

        Raises:
            DataError: An answer cannot be read by a model's chat template; the row is named.
            TrainingError: A metric asks a model that was not loaded.
        """
        found: list[dict[str, float]] = [{} for _ in answers]
        for metric in metrics:
            if not isinstance(metric, RewardModelMetric):
                continue
            judge = self._judge(metric.source)
            judge.seat()
            rows = [
                _row(metric.source, judge.template, prompt, answer)
                for prompt, answer in zip(asked, answers, strict=True)
            ]
            for of_row, score in zip(found, judge.scores(rows), strict=True):
                of_row[metric.source] = score
        return found

    def _judge(self, source: str) -> _Judge:
        if source not in self._judges:
            raise TrainingError(f"reward model {source!r} was not loaded with the run")
        return self._judges[source]

    def _loaded(self, source: str, recipe: Recipe) -> tuple[_Judge, str]:
        from graft.compressors.folder import load_adapter

        found = _find(source, recipe, self._ready, self._home)
        if found.is_model:
            return _Classifier.load(found.folder, recipe), found.name
        slot = f"reward-model-{len(self._judges)}"
        adapter = load_adapter(found.folder)
        return _SlotJudge(self._model, self._template, slot, adapter), found.name


@dataclass
class _SlotJudge:
    """An adapter with a head, on the base that others train on."""

    model: MultiAdapterModel
    template: ChatTemplate
    name: str
    adapter: Adapter

    def seat(self) -> None:
        if self.name not in self.model.slots:
            self.model.add_slot(self.name, self.adapter.method, tensors=self.adapter.tensors)

    def scores(self, rows: list[TokenRow]) -> list[float]:
        found = answer_scores(self.model, self.name, [scored_row(row) for row in rows])
        return [score for of_row in found for score in of_row]


@dataclass
class _Classifier:
    """A model of its own, with its own tokenizer."""

    model: PreTrainedModel
    template: ChatTemplate

    @classmethod
    def load(cls, folder: Path, recipe: Recipe) -> _Classifier:
        from graft.data.template import ChatTemplate
        from graft.models.classifier import load_reward_model
        from graft.models.tokenizer import load_tokenizer_in

        template = ChatTemplate(load_tokenizer_in(folder))
        return cls(load_reward_model(folder, recipe.model), template)

    def seat(self) -> None:
        pass

    @torch.inference_mode()
    def scores(self, rows: list[TokenRow]) -> list[float]:
        """Rows of one length are read together: nothing is padded."""
        found = [math.nan] * len(rows)
        by_length: dict[int, list[int]] = {}
        for at, row in enumerate(rows):
            by_length.setdefault(len(row.input_ids), []).append(at)
        size = _BATCH if self.model.config.get_text_config().pad_token_id is not None else 1
        for members in by_length.values():
            for start in range(0, len(members), size):
                own = members[start : start + size]
                ids = torch.tensor([rows[at].input_ids for at in own], device=self.model.device)
                logits = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
                for at, score in zip(own, logits[:, 0].double().tolist(), strict=True):
                    found[at] = score
        return found


def answer_outcomes(
    metrics: Iterable[Metric],
    asked: Sequence[EvalPrompt],
    answers: Sequence[str],
    judges: RewardModels | None,
) -> list[RowOutcome]:
    """Returns what metrics of answers score, with what reward models say where they are asked.

    Raises:
        DataError: An answer cannot be read by a model's chat template; the row is named.
        TrainingError: A metric asks a model that was not loaded.
    """
    told: list[dict[str, float] | None] = [None] * len(answers)
    if judges is not None:
        told = [scores or None for scores in judges.scores(metrics, asked, answers)]
    return [
        RowOutcome(
            prompt.reference,
            answer,
            loss_sum=None,
            num_tokens=None,
            part=prompt.part,
            model_scores=scores,
        )
        for prompt, answer, scores in zip(asked, answers, told, strict=True)
    ]


class _Found(NamedTuple):
    folder: Path
    name: str
    """Its digest, or its folder."""
    is_model: bool
    """A model of its own, no adapter of the base."""


def require_reward_models(recipe: Recipe, ready: ReadyModel, home: Path) -> None:
    """Finds what a recipe names, and loads nothing.

    Raises:
        AdapterError: No such adapter, no reward model, or one of another base.
        ModelError: A folder that is no sequence classifier of one output.
    """
    for source in _all_sources(recipe):
        _find(source, recipe, ready, home)


def _find(source: str, recipe: Recipe, ready: ReadyModel, home: Path) -> _Found:
    from graft.artifacts import Store
    from graft.methods.whole import WholeMethod
    from graft.models.classifier import require_one_output

    folder = Path(source).expanduser()
    if (folder / _MODEL_FILE).is_file() and not (folder / _ADAPTER_FILE).is_file():
        require_one_output(folder)
        return _Found(folder, str(folder.absolute()), is_model=True)
    try:
        stored = Store(home).resolve(source, allow_folder=True)
    except AdapterError as error:
        raise AdapterError(
            f"reward model {source!r} is neither a classifier's folder nor an adapter: {error}; "
            "train one with objective: reward"
        ) from error
    if stored.record.purpose != "scores":
        raise AdapterError(
            f"reward model {source!r} is an adapter that answers (objective "
            f"{stored.record.recipe.get('objective', {}).get('type', 'unknown')}); train one "
            "that scores with objective: reward"
        )
    is_model = stored.record.kind == "full"
    if not is_model and stored.record.base_digest not in (None, ready.digest):
        raise AdapterError(
            f"reward model {source!r} is an adapter of another base; train it on "
            f"{ready.source}, or with method full, which makes a model of its own"
        )
    if not is_model and isinstance(recipe.method, WholeMethod):
        raise AdapterError(
            f"reward model {source!r} is an adapter of the base that method "
            f"{recipe.method.type} trains itself; train it with method full, which makes a "
            "model of its own, or train with lora"
        )
    return _Found(stored.path, stored.digest or str(stored.path.absolute()), is_model)


def _all_sources(recipe: Recipe) -> list[str]:
    return [*rewarding_sources(recipe), *_sources(recipe.eval.metrics)]


def rewarding_sources(recipe: Recipe) -> list[str]:
    """Returns the reward models that a recipe's rewards ask."""
    objective = recipe.objective
    rewards = objective.rewards if isinstance(objective, SamplingObjective) else ()
    return _sources(reward.metric for reward in rewards)


def _sources(metrics: Iterable[Metric]) -> list[str]:
    return [metric.source for metric in metrics if isinstance(metric, RewardModelMetric)]


def _row(source: str, template: ChatTemplate, prompt: EvalPrompt, answer: str) -> TokenRow:
    try:
        row = template.answers(prompt.messages, [answer], source=prompt.source)
    except (DataError, ModelError) as error:
        raise DataError(f"reward model {source!r} cannot read an answer: {error}") from error
    if len(row.input_ids) > template.context_tokens:
        raise DataError(
            f"{prompt.source}: prompt and answer have {len(row.input_ids)} tokens, and the context "
            f"of reward model {source!r} is {template.context_tokens}; shorten the row or lower "
            "max_new_tokens"
        )
    return row
