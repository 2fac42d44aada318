"""The largest forward pass of a training step: what a recipe bounds, or what its rows come to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from graft.data.records import TokenRow
from graft.engine.answers import CACHE_TOKENS, MAX_BATCH
from graft.engine.lanes import Lanes, divide
from graft.engine.reading import READ_TOKENS
from graft.methods.whole import WholeMethod
from graft.metrics.base import METRICS
from graft.objectives.base import Objective
from graft.objectives.sampling import SamplingObjective
from graft.recipe.sections import Recipe


class Workload(NamedTuple):
    """One micro-batch, and how many a step has."""

    rows: int
    """Lines of the batch."""
    row_tokens: int
    """Of each line, padding included."""
    supervised_tokens: int
    """Positions whose logits are computed, of all rows."""
    num_micro_batches: int = 1
    """Of a step and worker; from the second one on gradients stand while activations grow."""
    is_padded: bool = True
    """Some rows are shorter than the longest, so that attention takes a mask."""
    has_branches: bool = False
    """Several answers stand behind one prompt, so that attention takes a mask of its own."""
    lanes: int = 1
    """Such micro-batches that run side by side, as they do on a CPU of several cores."""

    @property
    def tokens(self) -> int:
        """Of the whole micro-batch, padding included."""
        return self.rows * self.row_tokens

    @classmethod
    def bound(
        cls,
        recipe: Recipe,
        slots: int = 1,
        *,
        device: torch.device | None = None,
        threads: int | None = None,
    ) -> Workload:
        """Returns the largest that a recipe allows, whatever its rows are.

        Rows are taken to be as long as `data.max_length` lets them be, every token supervised;
        those with several answers hold them all behind a prompt of no length.

        Args:
            recipe: Complete.
            slots: Slots that train together, each with a batch of its own.
            device: Of the base; a CPU runs several micro-batches side by side. None runs one.
            threads: Of the process that trains; None means this one's.
        """
        sizes = [_longest_row(part.objective, part.section.max_length) for part in recipe.parts]
        row_tokens, supervised, has_branches = max(sizes)
        num_rows = _rows_of_a_worker(recipe, slots)
        lanes = _lanes(recipe, num_rows * row_tokens, device, threads)
        rows = max(1, min(num_rows, lanes.max_tokens // row_tokens))
        num_micro_batches = -(-num_rows // rows)
        return cls(
            rows=rows,
            row_tokens=row_tokens,
            supervised_tokens=rows * supervised,
            num_micro_batches=num_micro_batches,
            has_branches=has_branches,
            lanes=min(lanes.number, num_micro_batches),
        )

    @classmethod
    def of_rows(
        cls,
        recipe: Recipe,
        rows: Sequence[TokenRow],
        slots: int = 1,
        *,
        device: torch.device | None = None,
    ) -> Workload:
        """Returns the largest that training rows come to.

        Args:
            recipe: Complete.
            rows: All that are trained on.
            slots: Slots that train together on them.
            device: As above.
        """
        num_rows = min(_rows_of_a_worker(recipe, slots), len(rows) * slots)
        longest_first = sorted(rows, key=lambda row: -len(row.input_ids))
        taken = [row for row in longest_first for _ in range(slots)][:num_rows]
        lanes = _lanes(recipe, sum(len(row.input_ids) for row in taken), device)
        groups: list[list[TokenRow]] = []
        for row in taken:
            length = len(groups[-1][0].input_ids) if groups else 0
            if groups and (len(groups[-1]) + 1) * length <= lanes.max_tokens:
                groups[-1].append(row)
            else:
                groups.append([row])
        largest = max(groups, key=lambda group: len(group) * len(group[0].input_ids))
        return cls(
            rows=len(largest),
            row_tokens=len(largest[0].input_ids),
            supervised_tokens=max(sum(len(row.targets) for row in group) for group in groups),
            num_micro_batches=len(groups),
            is_padded=len({len(row.input_ids) for row in largest}) > 1,
            has_branches=any(row.num_branches > 1 for row in largest),
            lanes=min(lanes.number, len(groups)),
        )

    @classmethod
    def held_out(cls, recipe: Recipe) -> Workload:
        """Returns the largest pass over held-out rows that a recipe allows."""
        longest = max(part.section.max_length for part in recipe.parts)
        rows = max(1, READ_TOKENS // longest)
        return cls(rows, longest, rows * (longest - 1))


class Answers(NamedTuple):
    """Answers that are generated together."""

    rows: int
    prompt_tokens: int
    max_tokens: int
    """Of a prompt and its answer."""

    @classmethod
    def bound(cls, recipe: Recipe) -> Answers | None:
        """Returns the most that a recipe generates, for metrics or to learn from; None: nothing."""
        longest = max(part.section.max_length for part in recipe.parts)
        found = []
        if needs_answers(recipe):
            total = longest + recipe.eval.max_new_tokens
            found.append(cls(recipe.eval.batch_size, longest, total))
        for part in recipe.parts:
            if isinstance(part.objective, SamplingObjective):
                total = longest + part.objective.max_new_tokens
                asked = _rows_of_a_worker(recipe, 1) * part.objective.group_size
                rows = min(asked, MAX_BATCH, max(1, CACHE_TOKENS // total))
                found.append(cls(rows, longest, total))
        return max(found, key=lambda answers: answers.rows * answers.max_tokens, default=None)


def needs_answers(recipe: Recipe) -> bool:
    """Says whether held-out prompts are answered, for a metric that is reported or searched."""
    if not any(part.section.eval for part in recipe.parts):
        return False
    needs = [metric.needs for metric in recipe.eval.metrics]
    needs += [METRICS.get(name).needs for name in _searched(recipe)]
    return "generation" in needs


def _searched(recipe: Recipe) -> list[str]:
    names = [o.metric.rpartition("/")[2] for o in recipe.search.objectives]
    return [name for name in names if name in METRICS.names()]


def _rows_of_a_worker(recipe: Recipe, slots: int) -> int:
    return -(-recipe.train.batch_size * slots // recipe.scale.min_workers)


def _longest_row(objective: Objective, max_length: int) -> tuple[int, int, bool]:
    """Tokens, supervised ones, and whether there are several answers behind one prompt."""
    if isinstance(objective, SamplingObjective):
        answers = objective.group_size * objective.max_new_tokens
        return max_length + answers, answers, True
    if objective.columns == {"preference"}:
        return 2 * max_length, 2 * max_length - 2, True
    return max_length, max_length - 1, False


def _lanes(
    recipe: Recipe, num_tokens: int, device: torch.device | None, threads: int | None = None
) -> Lanes:
    """How a worker divides a step, with the threads of the recipe before any others."""
    is_alone = recipe.scale.needs_deepspeed or isinstance(recipe.method, WholeMethod)
    if device is None or is_alone:
        return Lanes(1, recipe.train.micro_batch_tokens)
    threads = recipe.scale.threads or threads
    return divide(num_tokens, recipe.train.micro_batch_tokens, device, threads)
