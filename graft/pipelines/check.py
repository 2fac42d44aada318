"""`check`: prove model and data before anything is spent on them."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from graft.core.model import Listed, StrictModel
from graft.core.progress import QUIET, Progress
from graft.data import (
    ChatTemplate,
    DataProof,
    PreparedData,
    TokenRow,
    prepare_data,
    prepare_parts,
)
from graft.engine.measurable import require_measurable
from graft.engine.reward_models import require_reward_models
from graft.engine.run import report_metrics
from graft.models import ReadyModel, load_tokenizer, resolve_model
from graft.recipe.mixture import require_single

if TYPE_CHECKING:
    from graft.recipe.sections import Recipe
    from graft.recipe.space import RecipeSpace


class Segment(StrictModel):
    """Neighbouring tokens of one kind, as text."""

    text: str
    num_tokens: int
    is_supervised: bool
    branch: int = 0
    """Which of several answers it is in: 1 is the chosen one of a pair, 2 the other."""


class RenderedRow(StrictModel):
    """A training row as the model sees it."""

    source: str
    segments: Listed[Segment]
    is_asked: bool = False
    """Training samples answers to it; the one that is known is not learned, only compared with."""
    is_wanted: bool | None = None
    """What is known of an answer without a pair."""


class CheckReport(StrictModel):
    """What was proved."""

    model: ReadyModel
    context_tokens: int
    data: DataProof
    feedback: DataProof | None
    """Of the loop's new rows, where the recipe names them."""
    samples: Listed[RenderedRow]


def check(
    space: RecipeSpace, *, home: Path, num_samples: int = 2, progress: Progress = QUIET
) -> CheckReport:
    """Reads, renders and tokenizes all data of a recipe with its own model's template.

    Args:
        space: The recipe; of its holes that of the objective matters: rows must suit every option.
        home: Where base models are kept.
        num_samples: Training rows to show, from the first on.
        progress: Told what is being done.

    Raises:
        ModelError: The base, or a reward model that is one, is missing or unsuitable.
        AdapterError: A reward model that is an adapter is.
        DataError: A row or a file is wrong; it is named.
    """
    recipe = space.example()
    ready = resolve_model(recipe.model, home, progress=progress)
    template = ChatTemplate(load_tokenizer(ready))
    prepared = prepare_for_all(space, template, progress=progress)[recipe.objective.row_key]
    for each in (recipe, *space.examples()):
        require_reward_models(each, ready, home)
    return CheckReport(
        model=ready,
        context_tokens=template.context_tokens,
        data=prepared.proof,
        feedback=_check_feedback(recipe, template, progress),
        samples=tuple(render_row(row, template) for row in prepared.train[:num_samples]),
    )


def prepare_for_all(
    space: RecipeSpace, template: ChatTemplate, *, progress: Progress = QUIET
) -> dict[str, PreparedData]:
    """Prepares the rows of a recipe, and proves them for every objective that a hole offers.

    Returns:
        By the objective's `row_key`.

    Raises:
        DataError: A row or a file is wrong, an objective cannot learn from these rows, a reward or
            metric cannot score them, or an answer may be longer than the context.
    """
    example = space.example()
    known = {example.objective.row_key: prepare_parts(example.parts, template, progress=progress)}
    for recipe in (example, *space.examples()):
        key = recipe.objective.row_key
        if key not in known:
            known[key] = prepare_parts(recipe.parts, template)
        searched = () if space.is_complete else report_metrics(recipe)
        require_measurable(recipe, known[key], template.context_tokens, searched=searched)
    return known


def render_row(row: TokenRow, template: ChatTemplate) -> RenderedRow:
    """Turns a token row back into text, cut where supervision or an answer begins and ends."""
    segments, is_asked = [], row.asked is not None
    branches = row.branch or [0] * len(row.input_ids)
    tokens = zip(row.is_supervised, branches, row.input_ids, strict=True)
    for (is_supervised, branch), group in groupby(tokens, key=lambda token: token[:2]):
        ids = [token for _, _, token in group]
        text = str(template.tokenizer.decode(ids, skip_special_tokens=False))
        segments.append(
            Segment(
                text=text,
                num_tokens=len(ids),
                is_supervised=is_supervised and not is_asked,
                branch=branch,
            )
        )
    return RenderedRow(
        source=row.source,
        segments=tuple(segments),
        is_asked=is_asked,
        is_wanted=None if row.label is None else row.label == 1,
    )


def _check_feedback(recipe: Recipe, template: ChatTemplate, progress: Progress) -> DataProof | None:
    if recipe.loop.feedback is None:
        return None
    data = require_single(recipe.data, "loop.feedback")
    new = {"train": recipe.loop.feedback, "eval": recipe.loop.feedback_eval}
    section = data.model_copy(update={**new, "limit": None, "eval_limit": None})
    return prepare_data(section, recipe.objective, template, progress=progress).proof
