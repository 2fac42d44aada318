"""Generation on all cores of a CPU: a generator in each lane, requests shared out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from graft.core.progress import QUIET, Progress
from graft.engine.generate import GenerationEvent, GenerationRequest, GenerationResult, Generator
from graft.engine.lanes import in_lanes, num_lanes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from graft.engine.multi import MultiAdapterModel

MIN_LANE_REQUESTS = 4
"""Requests that are worth a lane of their own; fewer read the base's weights together."""


class LaneGenerator:
    """Steps several generators at once; on a GPU, or on one core, there is one.

    It is used as a `Generator` is, by one thread; what that thread does to the model between two
    steps meets no lane at work.

    Args:
        model: The base with its slots.
        tokenizer: Turns tokens into text.
        max_batch: Requests decoded together, in all lanes.
        max_length: Longest prompt and answer together, in tokens.
    """

    def __init__(
        self,
        model: MultiAdapterModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_batch: int,
        max_length: int,
    ) -> None:
        number = _num_lanes(model, max_batch)
        rooms = [max_batch // number + (at < max_batch % number) for at in range(number)]
        self._lanes = [
            Generator(model, tokenizer, max_batch=room, max_length=max_length) for room in rooms
        ]

    @property
    def is_idle(self) -> bool:
        """Nothing runs, waits or remains to be told."""
        return all(lane.is_idle for lane in self._lanes)

    def max_tokens(self, slot: str | None) -> int:
        """Longest prompt and answer together of a slot; see `Generator.max_tokens`."""
        return self._lanes[0].max_tokens(slot)

    def submit(self, request: GenerationRequest) -> int:
        """Queues a request in the lane that is worth it most, and returns its id.

        Raises:
            ConfigError: The prompt is empty, or leaves no room for one token.
        """
        open_ = [lane.num_running + lane.num_waiting for lane in self._lanes]
        few = [at for at, number in enumerate(open_) if 0 < number < MIN_LANE_REQUESTS]
        at = few[0] if few else open_.index(min(open_))
        return self._lanes[at].submit(request) * len(self._lanes) + at

    def cancel(self, request_id: int) -> None:
        """Ends a request; an unknown or finished id is ignored."""
        number, at = divmod(request_id, len(self._lanes))
        self._lanes[at].cancel(number)

    def reset(self) -> None:
        """Forgets every request without a word; for whoever saw `step` raise."""
        for lane in self._lanes:
            lane.reset()

    def step(self) -> list[GenerationEvent]:
        """Adds one token to every running request, and says what happened."""
        busy = [(at, lane) for at, lane in enumerate(self._lanes) if not lane.is_idle]
        told = in_lanes([lane.step for _, lane in busy])
        return [
            event._replace(request_id=event.request_id * len(self._lanes) + at)
            for (at, _), events in zip(busy, told, strict=True)
            for event in events
        ]


def generate(
    model: MultiAdapterModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[GenerationRequest],
    *,
    max_batch: int,
    max_length: int,
    progress: Progress = QUIET,
) -> list[GenerationResult]:
    """Answers all requests, in their order; each lane decodes a share of them by itself.

    Args:
        model: The base with its slots.
        tokenizer: Turns tokens into text.
        requests: Of any slots.
        max_batch: Requests decoded together.
        max_length: Longest prompt and answer together, in tokens.
        progress: Told of every answer.
    """
    number = _num_lanes(model, min(len(requests), max_batch))
    size = -(-len(requests) // number)
    with progress.task("generate", len(requests), "answer") as task:

        def share(start: int) -> list[GenerationResult]:
            own = requests[start : start + size]  # together: a prompt asked again is read once
            room = max(1, min(-(-max_batch // number), len(own)))
            generator = Generator(model, tokenizer, max_batch=room, max_length=max_length)
            return generator.run(own, task)

        starts = range(0, len(requests), max(size, 1))
        shares = in_lanes([partial(share, start) for start in starts])
    return [result for own in shares for result in own]


def _num_lanes(model: MultiAdapterModel, num_requests: int) -> int:
    # Layers that are divided between workers are gathered by one pass at a time.
    most = 1 if model.is_partitioned else num_requests // MIN_LANE_REQUESTS
    return num_lanes(model.device, most)
