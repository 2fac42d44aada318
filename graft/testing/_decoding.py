"""Answers of one batch, held to each request alone and to whole forward passes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graft.testing.tiny import tiny_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from graft.engine.generate import GenerationRequest
    from graft.engine.multi.model import MultiAdapterModel

_PROMPTS = ("put lamp to 7", "she sells sea shells by the sea shore")


def mixed_answers(
    routed: MultiAdapterModel, slots: Sequence[str | None], *, num_new: int = 6
) -> list[tuple[int, ...]]:
    """Decodes a batch of all slots in which others join as cells are freed; checks every answer.

    Args:
        routed: Holds the slots.
        slots: Each is asked both prompts; None is the bare base.
        num_new: Tokens of an answer.

    Returns:
        Each slot's answer to the first prompt.
    """
    from graft.engine.generate import GenerationRequest, Generator

    tokenizer = tiny_tokenizer()
    requests = [
        GenerationRequest(tokenizer.encode(prompt), slot=slot, max_new_tokens=num_new + at % 3)
        for prompt in _PROMPTS
        for at, slot in enumerate(slots)
    ]
    together = Generator(routed, tokenizer, max_batch=len(slots)).run(requests)
    lone = Generator(routed, tokenizer, max_batch=1)
    for request, result in zip(requests, together, strict=True):
        (alone,) = lone.run([request])
        assert result.token_ids == alone.token_ids, f"{request.slot}: others change its answer"
        assert result.token_ids == _by_whole_passes(routed, request), (
            f"{request.slot}: decoding differs from whole forward passes"
        )
    return [tuple(result.token_ids[:num_new]) for result in together[: len(slots)]]


def _by_whole_passes(routed: MultiAdapterModel, request: GenerationRequest) -> list[int]:
    """The likeliest token, again and again, nothing cached."""
    import torch

    from graft.engine.multi.routing import Routing

    ids = list(request.prompt_ids)
    routing = Routing.single(request.slot, 1)
    with torch.no_grad():
        for _ in range(request.max_new_tokens):
            hidden = routed.hidden(torch.tensor([ids]), routing=routing)
            ids.append(int(routed.logits(hidden)[0, -1].argmax()))
    return ids[len(request.prompt_ids) :]
