"""Rows whose states below all slots are kept: their passes start at the lowest adapted layer.

See `graft.engine.multi.lower_layers`, which keeps them, and `graft.engine.reading`, which reads
them.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from hashlib import blake2b
from typing import TYPE_CHECKING

from graft.data.records import TokenRow
from graft.engine.batches import MicroBatch, RoutedRow, micro_batches
from graft.models.rope import short_context

if TYPE_CHECKING:
    from graft.engine.multi import MultiAdapterModel


def row_key(row: TokenRow) -> bytes:
    """Names what a row's states depend on: its tokens, and which of them see which."""
    digest = blake2b(array("q", row.input_ids).tobytes(), digest_size=16)
    if row.branch:
        digest.update(b"branches" + array("q", row.branch).tobytes())
    return digest.digest()


def batches_of(
    model: MultiAdapterModel, rows: Sequence[RoutedRow], max_tokens: int
) -> list[MicroBatch]:
    """Splits rows into micro-batches of what may be read in one pass.

    Apart are rows whose states are kept, and rows so long that the base would read their neighbours
    otherwise too.

    Args:
        model: That will run them.
        rows: In any order.
        max_tokens: Padded tokens of one; see `micro_batches`.
    """
    parts: defaultdict[tuple[bool, bool], list[RoutedRow]] = defaultdict(list)
    for routed in rows:
        is_kept = model.lower.start > 0 and model.lower.has(row_key(routed.row))
        parts[not is_kept, _is_long(model, routed)].append(routed)
    return [
        batch
        for key in sorted(parts)
        for batch in micro_batches(
            parts[key], max_tokens, model.device, shares_prompts=model.shares_prompts
        )
    ]


def _is_long(model: MultiAdapterModel, routed: RoutedRow) -> bool:
    short, row = short_context(model.base.config), routed.row
    if short is None:
        return False
    longest = max(len(row.branch_columns(k)) for k in range(1, row.num_branches + 1))
    return longest + model.prompts.num_virtual_tokens(routed.slot) > short


def from_lower_states(model: MultiAdapterModel, batch: MicroBatch) -> AbstractContextManager[None]:
    """What a micro-batch runs under: layers below all slots are left out where they may be."""
    if not model.lower.start or batch.columns is not None:
        return nullcontext()
    states = model.lower.states([row_key(routed.row) for routed in batch.rows])
    return nullcontext() if states is None else model.lower.skipped(states)
