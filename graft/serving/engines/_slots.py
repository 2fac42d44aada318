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
from graft.engine.publish import require_answers

if TYPE_CHECKING:
    from graft.artifacts import Store
    from graft.compressors.base import Adapter
    from graft.engine.multi import MultiAdapterModel

logger = logging.getLogger(__name__)


class UnusableAdapterError(ServingError):
    """An adapter cannot be put on the base; the message may be shown to a tenant."""


@dataclass
class _Held:
    loading: asyncio.Task[None]
    num_users: int = 0


class AdapterSlots:
    """Which digests are on the base, and how many requests use each.

    Args:
        model: The base.
        store: Where adapters are.
        base_digest: Adapters of another base are refused.
        max_adapters: Beyond, unused ones are taken off, the longest unused first.
        run: Runs a function in the thread that owns the model.
    """

    def __init__(
        self,
        model: MultiAdapterModel,
        store: Store,
        *,
        base_digest: str,
        max_adapters: int,
        run: Callable[[Callable[[], Any]], Awaitable[Any]],
    ) -> None:
        self._model = model
        self._store = store
        self._base_digest = base_digest
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
        if held is None:
            held = _Held(asyncio.ensure_future(self._load(digest)))
        self._held[digest] = held  # last: used most recently
        held.num_users += 1
        try:
            await asyncio.shield(held.loading)
        except BaseException:
            held.num_users -= 1
            if held.loading.done() and self._held.get(digest) is held:
                self._forget_failed(digest, held)
            raise

    def release(self, digest: str | None) -> None:
        """Ends one use."""
        if digest is not None and digest in self._held:
            self._held[digest].num_users -= 1

    def _forget_failed(self, digest: str, held: _Held) -> None:
        if held.loading.cancelled() or held.loading.exception() is not None:
            del self._held[digest]

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
        if stored.record.base_digest != self._base_digest:
            raise AdapterError(
                f"adapter {digest[:12]} was made for base {stored.record.base_source} "
                f"({str(stored.record.base_digest)[:12]}), this one is {self._base_digest[:12]}"
            )
        require_answers(stored, "serve")
        adapter = load_adapter(stored.path)
        if "native" not in adapter.method.servable:
            raise AdapterError(
                f"adapter {digest[:12]} is of method {adapter.method.type}, which is not served "
                "beside others; export it merged and serve that model"
            )
        return adapter

    async def _make_room(self) -> None:
        unused = [digest for digest, held in self._held.items() if held.num_users == 0]
        for digest in unused[: max(len(self._held) - self._max_adapters, 0)]:
            del self._held[digest]
            await self._run(partial(self._model.remove_slot, digest))
