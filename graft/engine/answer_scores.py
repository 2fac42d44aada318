"""Scores of answers by a slot's head: what a reward model says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from graft.core.errors import TrainingError
from graft.core.progress import QUIET, Progress
from graft.data.records import TokenRow
from graft.engine.batches import MicroBatch, RoutedRow
from graft.engine.logprobs import read_positions
from graft.engine.reading import read_rows_by
from graft.metrics.base import RowOutcome

if TYPE_CHECKING:
    from graft.engine.multi import MultiAdapterModel


@torch.inference_mode()
def answer_scores(
    model: MultiAdapterModel,
    slot: str | None,
    rows: Sequence[TokenRow],
    *,
    progress: Progress = QUIET,
) -> list[list[float]]:
    """Returns the score of each answer of each row.

    Args:
        model: Holds the slot.
        slot: A reward model; one without a head, or the bare base, scores everything 0.
        rows: As `scored_row` makes them.
        progress: Told of every row.
    """
    if slot is None or slot not in model.heads:
        return [[0.0] * row.num_branches for row in rows]
    found: list[list[float]] = [[] for _ in rows]
    routed = [RoutedRow(slot, row, index) for index, row in enumerate(rows)]

    def read(batch: MicroBatch) -> list[float]:
        hidden_PH = read_positions(model, batch).hidden_PH
        scores: list[float] = model.heads.values(slot, hidden_PH).tolist()
        return scores

    with progress.task("scores", len(rows), "row") as task:
        for batch, scores in read_rows_by(model, routed, read):
            for at, score in zip(batch.supervised_rows.tolist(), scores, strict=True):
                found[batch.rows[at].position].append(score)
            task.advance(len(batch.rows))
    return found


def score_outcomes(
    model: MultiAdapterModel,
    slot: str | None,
    pairs: Sequence[TokenRow],
    *,
    progress: Progress = QUIET,
) -> list[RowOutcome]:
    """Returns each pair's margin, and as its loss that of the pair (Bradley-Terry).

    Raises:
        TrainingError: A score is not finite.
    """
    outcomes = []
    scored = answer_scores(model, slot, pairs, progress=progress)
    for pair, (chosen, rejected) in zip(pairs, scored, strict=True):
        margin = chosen - rejected
        if not math.isfinite(margin):
            raise TrainingError(
                f"reward model {slot!r} scores {pair.source} {chosen} and {rejected}; its weights "
                "are broken"
            )
        loss = math.log1p(math.exp(-abs(margin))) + max(-margin, 0.0)
        outcomes.append(RowOutcome("", None, loss, 1, preference_margin=margin, part=pair.part))
    return outcomes
