"""Answers sampled in training: by all slots together, on all workers, the same wherever it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from graft.engine.generate import GenerationRequest, GenerationResult, generate
from graft.engine.text_stream import TextStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from graft.engine.backends.base import Backend
    from graft.engine.multi import MultiAdapterModel

CACHE_TOKENS = 16384
"""Tokens whose keys and values stand in memory at once; bounds how many answers grow together."""
MAX_BATCH = 64
_STOPPED, _CUT, _BROKEN = 1, 2, 3


class SampledAnswer(NamedTuple):
    """What a slot said."""

    token_ids: list[int]
    """With the token that ends it, where it ended by itself."""
    text: str
    is_truncated: bool
    """It was cut at its longest, and has no end."""
    is_broken: bool
    """The slot's logits were not finite."""


def sample_answers(
    model: MultiAdapterModel,
    tokenizer: PreTrainedTokenizerBase,
    backend: Backend,
    requests: Sequence[GenerationRequest],
) -> list[SampledAnswer]:
    """Answers all requests; every worker calls it alike, answers its share, and gets all.

    Where a forward pass takes all workers (ZeRO-3) each answers everything, and what the first one
    says counts.

    Args:
        model: Holds the slots.
        tokenizer: Of the base.
        backend: Of the training.
        requests: Of any slots.
    """
    longest = max(len(request.prompt_ids) + request.max_new_tokens for request in requests)
    room = max(1, min(MAX_BATCH, CACHE_TOKENS // longest))
    own = range(len(requests))
    if not backend.forwards_together:
        own = own[backend.world_rank :: backend.world_size]
    results = generate(
        model, tokenizer, [requests[at] for at in own], max_batch=room, max_length=longest
    )
    width = max(request.max_new_tokens for request in requests) + 1
    told = torch.zeros(len(requests), 2 + width, dtype=torch.float64)
    if not backend.forwards_together or backend.world_rank == 0:
        for at, result in zip(own, results, strict=True):
            _tell(told[at], result)
    told = backend.all_reduce_sum(told)
    return [_heard(row, tokenizer) for row in told.long().tolist()]


def _tell(row: torch.Tensor, result: GenerationResult) -> None:
    ids = result.token_ids + ([] if result.stop_id is None else [result.stop_id])
    kinds = {"stop": _STOPPED, "length": _CUT}
    row[0], row[1] = kinds.get(result.finish_reason, _BROKEN), len(ids)
    row[2 : 2 + len(ids)] = torch.tensor(ids, dtype=torch.float64)


def _heard(row: list[int], tokenizer: PreTrainedTokenizerBase) -> SampledAnswer:
    kind, count, *ids = row
    stream = TextStream(tokenizer)
    said = ids[: count - (kind == _STOPPED)]
    text = "".join(stream.push(token) for token in said) + stream.flush()
    return SampledAnswer(ids[:count], text, kind == _CUT, kind == _BROKEN)
