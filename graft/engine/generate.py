"""Generation with continuous batching over the many-adapter model.

Requests for different slots are decoded together, one token a step; a request joins as soon as a
cache cell is free and leaves at its last token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from graft.core.errors import ConfigError
from graft.core.progress import QUIET, Progress
from graft.engine.kv_cache import KVCache, require_full_attention
from graft.engine.multi import Routing
from graft.engine.sampling import next_tokens
from graft.engine.text_stream import TextStream
from graft.models.rope import short_context

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from graft.core.progress import Task
    from graft.engine.multi import MultiAdapterModel

FinishReason = Literal["stop", "length", "cancelled", "error"]
"""`stop`: a stop token or string; `length`: no room left; `error`: the logits were not finite."""

PREFILL_TOKENS = 2048
"""Padded prompt tokens of one forward pass."""


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt to be continued."""

    prompt_ids: list[int]
    slot: str | None = None
    """The adapter that answers; None is the bare base."""
    max_new_tokens: int = 64
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    stop_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    """Strings that end the answer and are not part of it."""
    seed: int = 0
    """Of the sampling; the same request and seed give the same answer."""


class GenerationEvent(NamedTuple):
    """What one step did to one request."""

    request_id: int
    token_id: int | None
    """The answer's next token; None where there is none: a stop token, cancelled, an error."""
    text: str
    """What can be shown now; all pieces together are the answer."""
    finish_reason: FinishReason | None
    stop_id: int | None = None
    """The stop token that ended the answer."""


class GenerationResult(NamedTuple):
    """A whole answer."""

    text: str
    token_ids: list[int]
    """The answer's tokens, the stop token not included."""
    finish_reason: FinishReason
    num_prompt_tokens: int
    stop_id: int | None = None
    """The stop token that ended it; None where none did."""


@dataclass
class _Running:
    """One request between its first and its last token."""

    request_id: int
    request: GenerationRequest
    cell: int
    stream: TextStream
    generator: torch.Generator | None
    last_token: int = 0
    num_virtual: int = 0
    """Virtual tokens before the prompt."""
    num_cached: int = 0
    """Tokens in its cell, virtual ones included."""
    num_new: int = 0
    is_cancelled: bool = False


@dataclass
class _Waiting:
    request_id: int
    request: GenerationRequest


@dataclass
class Generator:
    """Decodes many requests for many adapters together. Not thread-safe: one thread calls it.

    Args:
        model: The base with its slots; a request's slot must exist from `submit` to its last event.
        tokenizer: Turns tokens into text.
        max_batch: Requests decoded together.
        max_length: Longest prompt and answer together, in tokens; an adapter's virtual tokens are
            not counted, see `max_tokens`.
    """

    model: MultiAdapterModel
    tokenizer: PreTrainedTokenizerBase
    max_batch: int = 16
    max_length: int = 1024
    _waiting: deque[_Waiting] = field(default_factory=deque, init=False)
    _running: list[_Running] = field(default_factory=list, init=False)
    _early: list[GenerationEvent] = field(default_factory=list, init=False)
    _next_id: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        require_full_attention(
            self.model.base,
            "the native engine generates with full attention only: choose a base without them",
        )
        self._device = self.model.device
        self.reset()

    def reset(self) -> None:
        """Forgets every request without a word; for whoever saw `step` raise."""
        self._waiting.clear()
        self._running.clear()
        self._early.clear()
        self._cache = KVCache(max_batch=self.max_batch, max_length=self.max_length)
        self._free = list(range(self.max_batch))
        self._composition: tuple[list[int], Routing] | None = None

    @property
    def is_idle(self) -> bool:
        """Nothing runs, waits or remains to be told."""
        return not (self._running or self._waiting or self._early)

    @property
    def num_running(self) -> int:
        """Requests that hold a cache cell."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a cache cell."""
        return len(self._waiting)

    def max_tokens(self, slot: str | None) -> int:
        """Longest prompt and answer together of a slot, its virtual tokens not counted.

        It is `max_length`, or what those virtual tokens leave of the base's context where that is
        less: of the short one where the base has two, since one row in the long one would change
        what its neighbours and its own cache are read by.
        """
        num_virtual, config = self.model.prompts.num_virtual_tokens(slot), self.model.base.config
        limits = [self.max_length]
        if (short := short_context(config)) is not None:
            limits.append(short - num_virtual)
        if num_virtual and (context := getattr(config, "max_position_embeddings", None)):
            limits.append(int(context) - num_virtual)
        return min(limits)

    def submit(self, request: GenerationRequest) -> int:
        """Queues a request and returns its id; ids grow by one.

        Raises:
            ConfigError: The prompt is empty, or leaves no room for one token.
        """
        num_prompt = len(request.prompt_ids)
        if not num_prompt:
            raise ConfigError("the prompt is empty; give at least one token")
        room = self.max_tokens(request.slot)
        if num_prompt >= room:
            raise ConfigError(
                f"the prompt has {num_prompt} tokens; prompt and answer together may have {room}: "
                "shorten the prompt or raise max_length"
            )
        request_id, self._next_id = self._next_id, self._next_id + 1
        self._waiting.append(_Waiting(request_id, request))
        return request_id

    def cancel(self, request_id: int) -> None:
        """Ends a request; the next step tells its last event, `cancelled`.

        An unknown or finished id is ignored.
        """
        for waiting in self._waiting:
            if waiting.request_id == request_id:
                self._waiting.remove(waiting)
                self._early.append(GenerationEvent(request_id, None, "", "cancelled"))
                return
        for row in self._running:
            if row.request_id == request_id:
                row.is_cancelled = True

    @torch.inference_mode()
    def step(self) -> list[GenerationEvent]:
        """Adds one token to every running request, lets waiting ones in, and says what happened."""
        events, self._early = self._early, []
        for row in [row for row in self._running if row.is_cancelled]:
            events.append(GenerationEvent(row.request_id, None, "", "cancelled"))
            self._leave(row)
        if self._running:
            events += self._decode()
        while self._waiting and self._free:
            events += self._prefill(self._admit())
        return events

    def run(
        self, requests: Iterable[GenerationRequest], task: Task | None = None
    ) -> list[GenerationResult]:
        """Answers all requests, in their order; prompts of like length are read together.

        Args:
            requests: Of any slots.
            task: Told of every answer.
        """
        asked = list(requests)
        order = sorted(range(len(asked)), key=lambda at: -len(asked[at].prompt_ids))
        at_of = {self.submit(asked[at]): at for at in order}
        tokens: list[list[int]] = [[] for _ in asked]
        texts = [""] * len(asked)
        reasons: dict[int, FinishReason] = {}
        stop_ids: dict[int, int | None] = {}
        while len(reasons) < len(asked):
            for event in self.step():
                at = at_of[event.request_id]
                texts[at] += event.text
                if event.token_id is not None:
                    tokens[at].append(event.token_id)
                if event.finish_reason is not None:
                    reasons[at], stop_ids[at] = event.finish_reason, event.stop_id
                    if task is not None:
                        task.advance()
        return [
            GenerationResult(
                texts[at], tokens[at], reasons[at], len(request.prompt_ids), stop_ids[at]
            )
            for at, request in enumerate(asked)
        ]

    def _admit(self) -> list[_Running]:
        """Takes from the queue what one padded forward may hold; at least one request."""
        rows: list[_Running] = []
        prompts: set[_Prompt] = set()
        longest = 0
        while self._waiting and self._free:
            waiting = self._waiting[0]
            longest = max(longest, len(waiting.request.prompt_ids))
            prompts.add(_prompt(waiting.request))
            if rows and longest * len(prompts) > PREFILL_TOKENS:
                break
            self._waiting.popleft()
            rows.append(self._start(waiting))
        return rows

    def _start(self, waiting: _Waiting) -> _Running:
        request = waiting.request
        generator = None
        if request.temperature > 0:
            generator = torch.Generator().manual_seed(request.seed)
        return _Running(
            waiting.request_id,
            request,
            self._free.pop(0),
            TextStream(self.tokenizer, request.stop),
            generator,
            num_virtual=self.model.prompts.num_virtual_tokens(request.slot),
        )

    def _leave(self, row: _Running) -> None:
        self._running.remove(row)
        self._cache.clear(row.cell)
        self._free.append(row.cell)
        self._free.sort()
        self._composition = None

    def _prefill(self, rows: list[_Running]) -> list[GenerationEvent]:
        """Reads whole prompts, padded on the right, where causal attention never looks.

        A prompt that several rows of a slot ask is read once.
        """
        rows.sort(key=_by_slot)
        first: dict[_Prompt, _Running] = {}
        for row in rows:
            first.setdefault(_prompt(row.request), row)
        read = list(first.values())
        prompts = [row.request.prompt_ids for row in read]
        width = max(map(len, prompts))
        routing = _routing(read)
        prefix = self.model.prompts.prefix(routing)
        if prefix is None:
            mask = torch.ones(width, width, dtype=torch.bool, device=self._device).tril()
            mask = mask.expand(len(read), 1, width, width)
            position_ids = torch.arange(width, device=self._device).expand(len(read), width)
        else:
            mask = prefix.visible(width)
            position_ids = prefix.positions(width)
        self._cache.begin([row.cell for row in read], None, self._device, prefix)
        hidden = self.model.hidden(
            torch.tensor([ids + [0] * (width - len(ids)) for ids in prompts], device=self._device),
            routing=routing,
            attention_mask=mask,
            position_ids=position_ids,
            cache=self._cache,
        )
        for row in rows:
            row.num_cached = row.num_virtual + len(row.request.prompt_ids)
            source = first[_prompt(row.request)]
            if row is not source:
                self._cache.copy(source.cell, row.cell, row.num_cached)
        self._running = sorted(self._running + rows, key=_by_slot)
        self._composition = None
        last = [(at, len(ids) - 1) for at, ids in enumerate(prompts)]
        at_N, last_N = torch.tensor(last, device=self._device).unbind(1)
        logits = self.model.logits(hidden[at_N, last_N])
        number = {prompt: at for at, prompt in enumerate(first)}
        return self._take(rows, logits[[number[_prompt(row.request)] for row in rows]])

    def _decode(self) -> list[GenerationEvent]:
        """Feeds every running row its last token."""
        rows = list(self._running)
        if self._composition is None:
            self._composition = ([row.cell for row in rows], _routing(rows))
        cells, routing = self._composition
        positions = [row.num_cached for row in rows]
        self._cache.begin(cells, positions, self._device)
        position_ids = torch.tensor(positions, device=self._device)[:, None]
        mask = torch.arange(max(positions) + 1, device=self._device)[None] <= position_ids
        hidden = self.model.hidden(
            torch.tensor([[row.last_token] for row in rows], device=self._device),
            routing=routing,
            attention_mask=mask[:, None, None],
            position_ids=position_ids,
            cache=self._cache,
        )
        for row in rows:
            row.num_cached += 1
        return self._take(rows, self.model.logits(hidden[:, 0]))

    def _take(self, rows: list[_Running], logits: torch.Tensor) -> list[GenerationEvent]:
        tokens = next_tokens(
            logits,
            [(row.request.temperature, row.request.top_p, row.generator) for row in rows],
        )
        events = [self._advance(row, token) for row, token in zip(rows, tokens, strict=True)]
        for row, event in zip(rows, events, strict=True):
            if event.finish_reason is not None:
                self._leave(row)
        return events

    def _advance(self, row: _Running, token: int | None) -> GenerationEvent:
        if token is None:
            return GenerationEvent(row.request_id, None, row.stream.flush(), "error")
        if token in row.request.stop_ids:
            return GenerationEvent(row.request_id, None, row.stream.flush(), "stop", token)
        row.last_token = token
        row.num_new += 1
        text = row.stream.push(token)
        if row.stream.is_stopped:
            return GenerationEvent(row.request_id, token, text, "stop")
        num_own = row.num_cached - row.num_virtual
        room = self.max_tokens(row.request.slot)
        is_full = row.num_new >= row.request.max_new_tokens or num_own + 1 >= room
        if is_full:
            return GenerationEvent(row.request_id, token, text + row.stream.flush(), "length")
        return GenerationEvent(row.request_id, token, text, None)


def generate(
    model: MultiAdapterModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[GenerationRequest],
    *,
    max_batch: int,
    max_length: int,
    progress: Progress = QUIET,
) -> list[GenerationResult]:
    """Answers all requests, in their order.

    Args:
        model: The base with its slots.
        tokenizer: Turns tokens into text.
        requests: Of any slots.
        max_batch: Requests decoded together.
        max_length: Longest prompt and answer together, in tokens.
        progress: Told of every answer.
    """
    room = max(1, min(max_batch, len(requests)))
    generator = Generator(model, tokenizer, max_batch=room, max_length=max_length)
    with progress.task("generate", len(requests), "answer") as task:
        return generator.run(requests, task)


_Prompt = tuple[str | None, tuple[int, ...]]


def _prompt(request: GenerationRequest) -> _Prompt:
    """What two requests must have in common to be read as one."""
    return request.slot, tuple(request.prompt_ids)


def _by_slot(row: _Running) -> tuple[str, int]:
    return row.request.slot or "", row.cell


def _routing(rows: list[_Running]) -> Routing:
    """Rows stand in slot order; the bare base comes first."""
    slots: list[str | None] = []
    counts: list[int] = []
    for row in rows:
        if slots and slots[-1] == row.request.slot:
            counts[-1] += 1
        else:
            slots.append(row.request.slot)
            counts.append(1)
    return Routing(slots=tuple(slots), num_rows=tuple(counts))
