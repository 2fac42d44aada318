"""Scores of one slot, or of the bare base, on held-out rows, with intervals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from pydantic import Field

from graft.artifacts.record import MetricValue
from graft.core.errors import DataError, TrainingError
from graft.core.model import Listed, StrictModel
from graft.core.progress import QUIET, Progress
from graft.core.seeds import derive_seed
from graft.data.records import EvalPrompt, TokenRow
from graft.engine.answer_scores import score_outcomes
from graft.engine.batches import MicroBatch, RoutedRow
from graft.engine.generate import GenerationRequest, generate
from graft.engine.logprobs import supervised_logprobs
from graft.engine.reading import read_rows_by
from graft.engine.reward_models import RewardModels, answer_outcomes
from graft.methods.routing import Observed
from graft.metrics.base import Metric, RowOutcome

if TYPE_CHECKING:
    from graft.data.prepare import PreparedData
    from graft.data.template import ChatTemplate
    from graft.engine.multi import MultiAdapterModel

T = TypeVar("T")

NUM_RESAMPLES = 1000


class EvalReport(StrictModel):
    """What one adapter scored."""

    slot: str | None
    """None is the bare base."""
    metrics: dict[str, MetricValue]
    """By name, `eval/loss`; of a mixture's sources too, `eval/wiki/loss`."""
    scores: dict[str, Listed[float]]
    """Each row's own contribution, in the order of the held-out rows: pairs two reports."""
    num_tokens: Listed[int] = ()
    """Supervised tokens of each held-out row, by which its loss weighs; empty without a loss."""
    answers: Listed[str] = ()
    """Greedy answers in the order of the held-out prompts; empty where no metric needed them."""
    confidence: float
    """Of the intervals: percentile bootstrap over rows, seeded."""
    observed: dict[str, float] = Field(default_factory=dict)
    """What the method tells of itself (`method/expert_load_0`), means over rows and layers."""

    @property
    def values(self) -> dict[str, float]:
        """Metric name → value."""
        return {name: metric.value for name, metric in self.metrics.items()}


def evaluate(
    model: MultiAdapterModel,
    slot: str | None,
    prepared: PreparedData,
    metrics: Sequence[Metric],
    *,
    template: ChatTemplate,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    confidence: float = 0.95,
    rows: int | None = None,
    scores_answers: bool = False,
    judges: RewardModels | None = None,
    progress: Progress = QUIET,
) -> EvalReport:
    """Measures metrics on the held-out rows.

    Args:
        model: Holds the slot.
        slot: Who is measured; None is the bare base.
        prepared: Its `eval` rows give the loss, its `prompts` the answers.
        metrics: What is measured.
        template: Of the base: the tokenizer, and the tokens that end a turn.
        max_new_tokens: Longest answer.
        batch_size: Answers decoded together.
        confidence: Of the intervals.
        rows: Only the first so many held-out rows, without intervals; None is all.
        scores_answers: The slot is a reward model: loss and preference are of its scores.
        judges: Reward models that metrics ask.
        progress: Told of every row.

    Raises:
        DataError: There are no held-out rows of the needed kind.
        TrainingError: A metric is not finite: the adapter's weights or answers are broken.
    """
    kinds = {metric.needs for metric in metrics}
    outcomes: dict[str, list[RowOutcome]] = {}
    observed: dict[str, float] = {}
    if "loss" in kinds or scores_answers:
        with model.observed() as seen:
            outcomes["loss"] = loss_outcomes(
                model, slot, prepared.eval, rows, scores_answers=scores_answers, progress=progress
            )
        observed = _figures(seen)
    if scores_answers:
        outcomes["preference"] = outcomes["loss"]
    elif "preference" in kinds:
        pairs = _require(prepared.preferences[:rows], "pairs (`chosen` and `rejected`)")
        outcomes["preference"] = _pair_outcomes(model, slot, pairs, progress)
    if "generation" in kinds:
        prompts = _require(prepared.prompts[:rows], "prompts")
        answers = greedy_answers(
            model,
            slot,
            prompts,
            template=template,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            progress=progress,
        )
        outcomes["generation"] = answer_outcomes(metrics, prompts, answers, judges)
    values, scores = {}, {}
    for metric in metrics:
        for part, of_rows in _by_part(outcomes[metric.needs]).items():
            name = f"eval/{part}{metric.type}"
            value, scores[name] = _score(metric, name, slot, of_rows)
            low = high = None
            if rows is None:
                low, high = _interval(metric, name, of_rows, confidence)
            values[name] = MetricValue(value=value, low=low, high=high, rows=len(of_rows))
    return EvalReport(
        slot=slot,
        metrics=values,
        scores=scores,
        num_tokens=tuple(row.num_tokens or 0 for row in outcomes.get("loss", [])),
        answers=tuple(row.answer or "" for row in outcomes.get("generation", [])),
        confidence=confidence,
        observed=observed,
    )


def loss_outcomes(
    model: MultiAdapterModel,
    slot: str | None,
    held_out: Sequence[TokenRow],
    rows: int | None = None,
    *,
    scores_answers: bool = False,
    progress: Progress = QUIET,
) -> list[RowOutcome]:
    """Returns the loss of each held-out row; arguments are those of `evaluate`.

    Raises:
        DataError: There are no held-out rows.
        TrainingError: A score is not finite.
    """
    if scores_answers:
        pairs = _require(held_out[:rows], "pairs (`chosen` and `rejected`)")
        return score_outcomes(model, slot, pairs, progress=progress)
    wanted = _require(wanted_rows(held_out)[:rows], "rows")
    losses = row_losses(model, slot, wanted, progress=progress)
    return [
        RowOutcome("", None, loss_sum=total, num_tokens=count, part=row.part)
        for row, (total, count) in zip(wanted, losses, strict=True)
    ]


def _pair_outcomes(
    model: MultiAdapterModel, slot: str | None, pairs: Sequence[TokenRow], progress: Progress
) -> list[RowOutcome]:
    margins = pair_margins(model, slot, pairs, progress=progress)
    if not all(map(math.isfinite, margins)):
        raise TrainingError(
            f"{_named(slot)} gives answers no finite log-probability; its weights are broken"
        )
    return [
        RowOutcome("", None, None, None, preference_margin=margin, part=pair.part)
        for pair, margin in zip(pairs, margins, strict=True)
    ]


def wanted_rows(rows: Sequence[TokenRow]) -> list[TokenRow]:
    """Returns what a model should say: of pairs the chosen answer, no unwanted answers at all."""
    return [
        row.take(row.branch_columns(1))._replace(branch=None) if row.num_prompt_tokens else row
        for row in rows
        if row.label != 0
    ]


@torch.inference_mode()
def row_losses(
    model: MultiAdapterModel,
    slot: str | None,
    rows: Sequence[TokenRow],
    *,
    progress: Progress = QUIET,
) -> list[tuple[float, int]]:
    """Returns each row's summed negative log-likelihood, nats, and its number of supervised tokens.

    Rows of like length are read together, and the output head sees supervised positions only.
    """
    totals = [(0.0, 0)] * len(rows)
    with progress.task("held-out loss", len(rows), "row") as task:
        for batch, logprobs in _logprobs(model, slot, rows):
            num_rows = len(batch.rows)
            sums = torch.zeros(num_rows, dtype=torch.float64, device=model.device)
            sums.index_add_(0, batch.supervised_rows, -logprobs.double())
            counts = torch.bincount(batch.supervised_rows, minlength=num_rows)
            for member, total, count in zip(
                batch.rows, sums.tolist(), counts.tolist(), strict=True
            ):
                totals[member.position] = (total, count)
            task.advance(num_rows)
    return totals


@torch.inference_mode()
def pair_margins(
    model: MultiAdapterModel,
    slot: str | None,
    pairs: Sequence[TokenRow],
    *,
    progress: Progress = QUIET,
) -> list[float]:
    """Returns by how much each chosen answer's mean log-probability exceeds the rejected one's."""
    margins = [0.0] * len(pairs)
    with progress.task("held-out pairs", len(pairs), "pair") as task:
        for batch, logprobs in _logprobs(model, slot, pairs):
            at = 2 * batch.supervised_rows + batch.supervised_branches - 1
            size = 2 * len(batch.rows)
            sums = torch.zeros(size, dtype=torch.float64, device=model.device)
            means = sums.index_add_(0, at, logprobs.double()) / torch.bincount(at, minlength=size)
            chosen, rejected = means.reshape(-1, 2).unbind(1)
            for member, margin in zip(batch.rows, (chosen - rejected).tolist(), strict=True):
                margins[member.position] = margin
            task.advance(len(batch.rows))
    return margins


def _logprobs(
    model: MultiAdapterModel, slot: str | None, rows: Sequence[TokenRow]
) -> Iterator[tuple[MicroBatch, torch.Tensor]]:
    """Yields micro-batches and their targets' log-probabilities."""
    routed = [RoutedRow(slot, row, index) for index, row in enumerate(rows)]
    return read_rows_by(model, routed, partial(supervised_logprobs, model))


def greedy_answers(
    model: MultiAdapterModel,
    slot: str | None,
    prompts: Sequence[EvalPrompt],
    *,
    template: ChatTemplate,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    progress: Progress = QUIET,
) -> list[str]:
    """Returns the likeliest answer to each prompt, without special tokens."""
    longest = max(len(prompt.prompt_ids) for prompt in prompts)
    results = generate(
        model,
        template.tokenizer,
        [
            GenerationRequest(
                prompt.prompt_ids,
                slot=slot,
                max_new_tokens=max_new_tokens,
                stop_ids=template.stop_ids,
            )
            for prompt in prompts
        ],
        max_batch=batch_size,
        max_length=longest + max_new_tokens,
        progress=progress,
    )
    broken = [at for at, result in enumerate(results) if result.finish_reason == "error"]
    if broken:
        raise TrainingError(
            f"{_named(slot)} gives logits that are not finite at {prompts[broken[0]].source} and "
            f"{len(broken) - 1} more of {len(prompts)} prompts; its weights are broken"
        )
    return [result.text for result in results]


def _by_part(rows: list[RowOutcome]) -> dict[str, list[RowOutcome]]:
    """All rows under no name, and those of each source of a mixture under `name/`."""
    found = {"": rows}
    for row in rows:
        if row.part:
            found.setdefault(f"{row.part}/", []).append(row)
    return found


def _figures(seen: Observed) -> dict[str, float]:
    """Averages what was left under one slot; a name with several figures gets their numbers."""
    found: dict[str, float] = {}
    for (_, name), figures in seen.items():
        means = torch.cat(figures).double().mean(0).tolist()
        names = [f"method/{name}"] if len(means) == 1 else _numbered(name, len(means))
        found.update(zip(names, means, strict=True))
    return found


def _numbered(name: str, count: int) -> list[str]:
    return [f"method/{name}_{at}" for at in range(count)]


def _score(
    metric: Metric, name: str, slot: str | None, rows: list[RowOutcome]
) -> tuple[float, tuple[float, ...]]:
    value, scores = metric.score(rows)
    if not (math.isfinite(value) and all(map(math.isfinite, scores))):
        raise TrainingError(f"{name} of {_named(slot)} is not finite; its weights are broken")
    return value, tuple(scores)


def _interval(
    metric: Metric, name: str, rows: list[RowOutcome], confidence: float
) -> tuple[float, float]:
    rng = np.random.default_rng(derive_seed("bootstrap", name, len(rows)))
    resampled = [
        metric.score([rows[at] for at in rng.integers(0, len(rows), len(rows)).tolist()])[0]
        for _ in range(NUM_RESAMPLES)
    ]
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _require(rows: Sequence[T], kind: str) -> Sequence[T]:
    if not rows:
        raise DataError(
            f"the evaluation needs held-out {kind} and there are none; "
            "set data.eval to a file with at least one row"
        )
    return rows


def _named(slot: str | None) -> str:
    return "the bare base" if slot is None else f"adapter {slot!r}"
