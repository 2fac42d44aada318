"""Rows into micro-batches: grouped by length, padded on the right, ordered by slot.

A row with several branches is one line of the batch where the model can let its branches share the
prompt's forward pass. Elsewhere it is *expanded*: each branch becomes a line behind its own copy of
the prompt. What comes out, target by target, has the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from graft.data.records import TokenRow


class RoutedRow(NamedTuple):
    """A row of a step's batch and where it belongs."""

    slot: str | None
    row: TokenRow
    position: int
    """Position in its slot's batch of this step; the same on every worker."""


@dataclass(frozen=True)
class MicroBatch:
    """Rows that go through the model together."""

    rows: tuple[RoutedRow, ...]
    """In slot order."""
    lines: tuple[int, ...]
    """Row of each line of the batch, ascending; a line is a row, or a branch of an expanded one."""
    input_ids: torch.Tensor
    """`[lines, tokens]`, int64, padded on the right."""
    attention_mask: torch.Tensor | None
    """`[lines, tokens]`, None where nothing is padded."""
    branches: torch.Tensor | None
    """Branch of each token, `[lines, tokens]`; None where no line has several."""
    position_ids: torch.Tensor | None
    """`[lines, tokens]`; None where every line counts from 0."""
    columns: torch.Tensor | None
    """Column that each token has in its row, `[lines, tokens]`; None where no row is expanded."""
    supervised_rows: torch.Tensor
    """Row of each supervised token, `[positions]`, ascending, each row's in the row's own order."""
    supervised_lines: torch.Tensor
    """Line of each supervised token, `[positions]`."""
    supervised_tokens: torch.Tensor
    """Place of each supervised token in its line, `[positions]`."""
    predicting_tokens: torch.Tensor
    """Place of the token that predicts it, `[positions]`: the one before, or the prompt's last."""
    supervised_branches: torch.Tensor
    """Branch of each supervised token, `[positions]`; 0 in rows that do not branch."""

    @property
    def slots(self) -> tuple[tuple[str | None, int], ...]:
        """Slots with their numbers of rows, in order."""
        return _counted(routed.slot for routed in self.rows)

    @property
    def slot_lines(self) -> tuple[tuple[str | None, int], ...]:
        """Slots with their numbers of lines, in order."""
        return _counted(self.rows[at].slot for at in self.lines)


def _counted(slots: Iterable[str | None]) -> tuple[tuple[str | None, int], ...]:
    return tuple((slot, len(list(group))) for slot, group in groupby(slots))


class _Line(NamedTuple):
    """Some columns of a row, and what follows from its branches."""

    row: int
    columns: list[int]
    input_ids: list[int]
    branches: list[int]
    before: list[int]
    """Place of the token that each one follows; -1 for the first."""
    is_target: list[bool]


def _lines(at: int, row: TokenRow, *, shares_prompts: bool) -> list[_Line]:
    if shares_prompts or row.num_branches == 1:
        return [_line(at, row, list(range(len(row.input_ids))), has_prompt=True)]
    numbers = range(1, row.num_branches + 1)
    return [_line(at, row, row.branch_columns(k), has_prompt=k == 1) for k in numbers]


def _line(at: int, row: TokenRow, columns: list[int], *, has_prompt: bool) -> _Line:
    """Args: has_prompt: whether the prompt's own targets count here; they count once a row."""
    branches = [row.branch[column] for column in columns] if row.branch else [0] * len(columns)
    last_of_prompt = branches.count(0) - 1
    before = [
        place - 1 if place == 0 or branches[place] == branches[place - 1] else last_of_prompt
        for place in range(len(columns))
    ]
    targets = set(row.targets)
    is_target = [
        column in targets and (has_prompt or branch > 0)
        for column, branch in zip(columns, branches, strict=True)
    ]
    ids = [row.input_ids[column] for column in columns]
    return _Line(at, columns, ids, branches, before, is_target)


def _positions(line: _Line) -> list[int]:
    positions: list[int] = []
    for before in line.before:
        positions.append(positions[before] + 1 if before >= 0 else 0)
    return positions


def collate(
    rows: Sequence[RoutedRow], device: torch.device, *, shares_prompts: bool = True
) -> MicroBatch:
    """Pads the rows to the longest.

    Args:
        rows: In slot order.
        device: Where the tensors go.
        shares_prompts: Branches share a line with their prompt; else rows are expanded.
    """
    lines = [
        line
        for at, routed in enumerate(rows)
        for line in _lines(at, routed.row, shares_prompts=shares_prompts)
    ]

    def padded(values: list[list[int]]) -> torch.Tensor:
        return pad_sequence([torch.tensor(v) for v in values], batch_first=True).to(device)

    is_branched = any(max(line.branches) > 1 for line in lines if shares_prompts)
    is_expanded = len(lines) > len(rows)
    mask = padded([[1] * len(line.input_ids) for line in lines])
    targets = [
        (line.row, number, place, line.before[place], line.branches[place])
        for number, line in enumerate(lines)
        for place, is_target in enumerate(line.is_target)
        if is_target
    ]
    found = torch.tensor(targets, dtype=torch.long).reshape(-1, 5).to(device).unbind(1)
    return MicroBatch(
        rows=tuple(rows),
        lines=tuple(line.row for line in lines),
        input_ids=padded([line.input_ids for line in lines]),
        attention_mask=None if bool(mask.all()) else mask,
        branches=padded([line.branches for line in lines]) if is_branched else None,
        position_ids=padded([_positions(line) for line in lines]) if is_branched else None,
        columns=padded([line.columns for line in lines]) if is_expanded else None,
        supervised_rows=found[0],
        supervised_lines=found[1],
        supervised_tokens=found[2],
        predicting_tokens=found[3],
        supervised_branches=found[4],
    )


def micro_batches(
    rows: Sequence[RoutedRow],
    max_tokens: int,
    device: torch.device,
    *,
    shares_prompts: bool = True,
) -> list[MicroBatch]:
    """Splits rows into micro-batches of similar length: those that take least time.

    Args:
        rows: Of any slots, in any order.
        max_tokens: Padded tokens of one micro-batch; a longer row stands alone, with all its
            branches.
        device: Where the tensors go.
        shares_prompts: Branches share a line with their prompt; else rows are expanded.
    """
    sized = [_Sized(*_size(r.row, shares_prompts=shares_prompts), r) for r in rows]
    sized.sort(key=lambda s: (-s.length, str(s.routed.slot), s.routed.position))
    groups = _grouped(sized, max_tokens, _PASS_TOKENS.get(device.type, _PASS_TOKENS_ELSEWHERE))
    return [
        collate(
            sorted(group, key=lambda r: (str(r.slot), r.position)),
            device,
            shares_prompts=shares_prompts,
        )
        for group in groups
    ]


_PASS_TOKENS = {"cpu": 32}
_PASS_TOKENS_ELSEWHERE = 1024
"""Padded tokens that take as long as what every pass takes by itself, forward and backward."""


class _Sized(NamedTuple):
    """A row, the lines that it takes and the longest one's tokens."""

    num_lines: int
    length: int
    routed: RoutedRow


def _grouped(rows: Sequence[_Sized], max_tokens: int, pass_tokens: int) -> list[list[RoutedRow]]:
    """Divides rows, longest first, so that padded tokens and passes cost least together.

    Exact: the best division of the first rows is one of fewer rows and a last group.
    """
    least, starts = [0], [0]
    for end in range(1, len(rows) + 1):
        num_lines, found = 0, []
        for start in range(end - 1, -1, -1):
            num_lines += rows[start].num_lines
            padded = num_lines * rows[start].length
            if padded > max_tokens and end - start > 1:
                break
            found.append((least[start] + padded + pass_tokens, start))
        cost, start = min(found)
        least.append(cost)
        starts.append(start)
    bounds = [len(rows)]
    while bounds[0]:
        bounds.insert(0, starts[bounds[0]])
    return [[row.routed for row in rows[start:end]] for start, end in pairwise(bounds)]


def _size(row: TokenRow, *, shares_prompts: bool) -> tuple[int, int]:
    """Lines that a row takes, and the longest one's tokens."""
    if shares_prompts or row.num_branches == 1:
        return 1, len(row.input_ids)
    lengths = [len(row.branch_columns(k)) for k in range(1, row.num_branches + 1)]
    return len(lengths), max(lengths)
