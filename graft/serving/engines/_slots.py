"""Adapters on a base that serves: read from the store once, kept while used, taken off when old."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from graft.compressors.folder import load_adapter
from graft.core.errors import AdapterError, GraftError, ServingError
from graft.engine.publish import require_answers, require_base

if TYPE_CHECKING:
    from graft.artifacts import Store
    from graft.compressors.base import Adapter
    from graft.engine.multi import MultiAdapterModel
    from graft.models.ready import ReadyModel
    from graft.models.section import ModelSection

logger = logging.getLogger(__name__)


class UnusableAdapterError(ServingError):
    """An adapter cannot be put on the base; the message may be shown to a tenant."""


@dataclass
class _Held:
    loading: asyncio.Task[None]
    num_users: int = 0

    @property
    def has_failed(self) -> bool:
        """It was not put on the base."""
        ended = self.loading
        return ended.done() and (ended.cancelled() or ended.exception() is not None)

    @property
    def is_unused(self) -> bool:
        """Nobody uses it or waits for it."""
        return self.num_users == 0 and self.loading.done()


class AdapterSlots:
    """Which digests are on the base, and how many requests use each.

    Args:
        model: The base.
        store: Where adapters are.
        ready: The base as it was prepared: adapters of another one are refused.
        section: How it was loaded.
        max_adapters: Beyond, unused ones are taken off, the longest unused first.
        run: Runs a function in the thread that owns the model.
    """

    def __init__(
        self,
        model: MultiAdapterModel,
        store: Store,
        *,
        ready: ReadyModel,
        section: ModelSection,
        max_adapters: int,
        run: Callable[[Callable[[], Any]], Awaitable[Any]],
    ) -> None:
        self._model = model
        self._store = store
        self._ready, self._section = ready, section
        self._max_adapters = max_adapters
        self._run = run
        self._held: dict[str, _Held] = {}

    @property
    def digests(self) -> tuple[str, ...]:
        """Adapters on the base, the longest unused first."""
        return tuple(self._held)

    async def hold(self, digest: str | None) -> None:
        """Keeps an adapter on the base until `release`; requests for one share its loading.

        Raises:
            UnusableAdapterError: It is missing, damaged, or of another base.
        """
        if digest is None:
            return
        held = self._held.pop(digest, None)
        if held is None or held.has_failed:  # while nobody waited
            held = _Held(asyncio.ensure_future(self._load(digest)))
        self._held[digest] = held  # last: used most recently
        held.num_users += 1
        try:
            await asyncio.shield(held.loading)
        except BaseException:
            held.num_users -= 1
            if held.has_failed and self._held.get(digest) is held:
                del self._held[digest]
            raise

    def release(self, digest: str | None) -> None:
        """Ends one use."""
        if digest is not None and digest in self._held:
            self._held[digest].num_users -= 1

    async def _load(self, digest: str) -> None:
        try:
            adapter = await asyncio.to_thread(self._read, digest)
            await self._make_room()
            await self._run(
                lambda: self._model.add_slot(digest, adapter.method, tensors=adapter.tensors)
            )
        except (GraftError, OSError) as error:
            logger.error("adapter %s cannot be served: %s", digest[:12], error)
            raise UnusableAdapterError(
                f"The stored adapter {digest[:12]} is missing, damaged or does not fit the base; "
                "its operator must publish it anew."
            ) from error

    def _read(self, digest: str) -> Adapter:
        stored = self._store.open(digest)
        if stored.record.base_digest is None:
            raise AdapterError(f"adapter {digest[:12]} does not say which base it was made for")
        require_base(stored, self._ready, self._section)
        require_answers(stored, "serve")
        adapter = load_adapter(stored.path)
        if "native" not in adapter.method.servable:
            raise AdapterError(
                f"adapter {digest[:12]} is of method {adapter.method.type}, which is not served "
                "beside others; export it merged and serve that model"
            )
        return adapter

    async def _make_room(self) -> None:
        while len(self._held) > self._max_adapters:
            # Looked up anew each time: a request may have taken one up while another was removed.
            digest = next((d for d, held in self._held.items() if held.is_unused), None)
            if digest is None:
                return
            if not self._held.pop(digest).has_failed:
                await self._run(partial(self._model.remove_slot, digest))
