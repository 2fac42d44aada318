"""The embedded engine: one base, many adapters by digest, continuous batching in a thread."""

from __future__ import annotations

import asyncio
import copy
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from graft.core.errors import DataError, ServingError
from graft.engine.generate import GenerationEvent, GenerationRequest, Generator
from graft.serving.engines._slots import AdapterSlots, UnusableAdapterError
from graft.serving.messages import Item, Job, Piece, Refused, Started

if TYPE_CHECKING:
    from graft.artifacts import Store
    from graft.data.template import ChatTemplate
    from graft.engine.multi import MultiAdapterModel
    from graft.models.ready import ReadyModel
    from graft.models.section import ModelSection

logger = logging.getLogger(__name__)

_Outbox = asyncio.Queue["GenerationEvent | ServingError"]


class _Open(NamedTuple):
    """A request that the generator works on."""

    digest: str | None
    outbox: _Outbox


class NativeEngine:
    """Answers jobs on one event loop while one thread steps the generator.

    Every call on the model happens in that thread; adapters are read from the store in others.

    Args:
        model: The base; adapters come and go as slots named by digest.
        template: Of the base.
        store: Where adapters are.
        ready: The base as it was prepared: adapters of another one are refused.
        section: How it was loaded.
        max_batch: Requests decoded together.
        max_length: Prompt and answer together, in tokens.
        max_adapters: Adapters kept on the base; beyond, those longest unused are taken off.
    """

    def __init__(
        self,
        model: MultiAdapterModel,
        template: ChatTemplate,
        store: Store,
        *,
        ready: ReadyModel,
        section: ModelSection,
        max_batch: int = 16,
        max_length: int = 1024,
        max_adapters: int = 32,
    ) -> None:
        self.model = model
        self._template = template
        self.max_length = min(max_length, template.context_tokens)
        # Fast tokenizers change state while they encode, so each thread has its own.
        tokenizer = copy.deepcopy(template.tokenizer)
        self._generator = Generator(
            model, tokenizer, max_batch=max_batch, max_length=self.max_length
        )
        self._slots = AdapterSlots(
            model,
            store,
            ready=ready,
            section=section,
            max_adapters=max_adapters,
            run=self._in_thread,
        )
        self._open: dict[int, _Open] = {}
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._work, name="graft-engine", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """The engine's thread runs."""
        return self._thread.is_alive()

    @property
    def adapters(self) -> tuple[str, ...]:
        """Digests on the base at present."""
        return self._slots.digests

    def close(self) -> None:
        """Ends the thread; open requests get no more events."""
        self._inbox.put(None)
        self._thread.join(timeout=30)

    async def answer(self, job: Job) -> AsyncGenerator[Item, None]:
        """Answers one job; closing the generator cancels it.

        Raises:
            ServingError: The engine broke while it answered.
        """
        self._loop = asyncio.get_running_loop()
        prepared = self._prepare(job)
        if isinstance(prepared, Refused):
            yield prepared
            return
        try:
            await self._slots.hold(job.digest)
        except UnusableAdapterError as error:
            yield Refused(503, "adapter_unavailable", str(error))
            return
        # Only now is it known how many virtual tokens the adapter has.
        room = self._generator.max_tokens(job.digest)
        refused = _too_long(len(prepared.prompt_ids), job.max_tokens, room)
        if refused is not None:
            self._slots.release(job.digest)
            yield refused
            return
        outbox: _Outbox = asyncio.Queue()
        request_id = await self._submit(prepared, job.digest, outbox)
        try:
            yield Started(len(prepared.prompt_ids))
            async for piece in _pieces(outbox, is_streamed=job.is_streamed):
                yield piece
        finally:
            self._cancel(request_id)

    def _prepare(self, job: Job) -> GenerationRequest | Refused:
        try:
            ids = self._template.prompt_ids(job.messages, source="messages")
        except DataError as error:
            return Refused(400, "invalid_value", str(error), "messages")
        refused = _too_long(len(ids), job.max_tokens, self.max_length)
        if refused is not None:
            return refused
        return GenerationRequest(
            prompt_ids=ids,
            slot=job.digest,
            max_new_tokens=job.max_tokens or self.max_length - len(ids),
            temperature=job.temperature,
            top_p=job.top_p,
            stop_ids=self._template.stop_ids,
            stop=job.stop,
            seed=job.seed,
        )

    async def _submit(self, request: GenerationRequest, digest: str | None, outbox: _Outbox) -> int:
        def submit() -> int:
            request_id = self._generator.submit(request)
            self._open[request_id] = _Open(digest, outbox)
            return request_id

        # Shielded: a request that was submitted must be known here, or nobody could cancel it.
        submitted = asyncio.ensure_future(self._in_thread(submit))
        try:
            return int(await asyncio.shield(submitted))
        except asyncio.CancelledError:
            submitted.add_done_callback(lambda done: self._cancel(done.result()))
            raise

    def _cancel(self, request_id: int) -> None:
        self._inbox.put(lambda: self._generator.cancel(request_id))

    async def _in_thread(self, function: Callable[[], Any]) -> Any:
        """Runs a function between two steps, in the engine's thread."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Any] = loop.create_future()

        def settle(value: Any, error: BaseException | None) -> None:
            if done.cancelled():
                return
            if error is not None:
                done.set_exception(error)
            else:
                done.set_result(value)

        def run() -> None:
            try:
                value, error = function(), None
            except Exception as caught:  # handed to whoever asked
                value, error = None, caught
            loop.call_soon_threadsafe(settle, value, error)

        self._inbox.put(run)
        return await done

    def _work(self) -> None:
        """The engine's thread: commands first, then one step."""
        while True:
            if not self._take_commands():
                return
            try:
                events = self._generator.step()
            except Exception as error:  # the boundary: whoever waits is told, the engine goes on
                logger.exception("a generation step failed")
                self._fail_all(error)
                continue
            if events and self._loop is not None:
                with suppress(RuntimeError):  # the loop is closing with its process
                    self._loop.call_soon_threadsafe(self._deliver, events)

    def _take_commands(self) -> bool:
        """Runs what was asked; waits where nothing else is to do. False ends the thread."""
        while True:
            try:
                command = self._inbox.get(block=self._generator.is_idle)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()

    def _fail_all(self, error: Exception) -> None:
        broken, self._open = self._open, {}
        self._generator.reset()

        def tell() -> None:
            for opened in broken.values():
                self._slots.release(opened.digest)
                opened.outbox.put_nowait(ServingError(f"a generation step failed: {error}"))

        if self._loop is not None:
            self._loop.call_soon_threadsafe(tell)

    def _deliver(self, events: list[GenerationEvent]) -> None:
        for event in events:
            opened = self._open.get(event.request_id)
            if opened is None:
                continue
            if event.finish_reason is not None:
                del self._open[event.request_id]
                self._slots.release(opened.digest)
            opened.outbox.put_nowait(event)


async def _pieces(outbox: _Outbox, *, is_streamed: bool) -> AsyncGenerator[Item, None]:
    """Joins events that came meanwhile; one piece in all where no stream is wanted."""
    text, num_tokens = "", 0
    while True:
        event = await outbox.get()
        if isinstance(event, ServingError):
            raise event
        if event.finish_reason == "error":
            yield Refused(503, "adapter_unavailable", "The model gave no finite answer.")
            return
        text += event.text
        num_tokens += event.token_id is not None
        if event.finish_reason is not None:
            yield Piece(text, num_tokens, event.finish_reason)
            return
        if is_streamed and text and outbox.empty():
            yield Piece(text, num_tokens, None)
            text, num_tokens = "", 0


def _too_long(num_prompt: int, max_tokens: int | None, room: int) -> Refused | None:
    """Refuses a request whose prompt and answer do not fit into so many tokens."""
    wanted = 1 if max_tokens is None else max_tokens
    if num_prompt + wanted <= room:
        return None
    return Refused(
        400,
        "context_length_exceeded",
        f"This model's maximum context length is {room} tokens. However, your messages have "
        f"{num_prompt} tokens and {wanted} were asked for the answer. Please reduce the length of "
        "either one.",
        "messages",
    )
