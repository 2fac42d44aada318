"""Adapters that come and go on a base: none is taken off that somebody has just taken up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from graft.engine.multi import MultiAdapterModel
from graft.models.section import ModelSection
from graft.serving.engines._slots import AdapterSlots, UnusableAdapterError
from graft.testing import tiny_model
from tests.unit.serving.conftest import READY, Site


class Busy:
    """A base whose thread is in the middle of a step, now and then."""

    def __init__(self, site: Site, max_adapters: int) -> None:
        self.model = MultiAdapterModel(tiny_model())
        self.free = asyncio.Event()
        self.free.set()
        self.slots = AdapterSlots(
            self.model,
            site.store,
            ready=READY,
            section=ModelSection(source=READY.source),
            max_adapters=max_adapters,
            run=self._run,
        )

    async def _run(self, work: Callable[[], Any]) -> Any:
        await self.free.wait()
        return work()


def test_an_adapter_that_is_taken_up_while_others_are_removed_stays(site: Site) -> None:
    async def work() -> None:
        busy = Busy(site, max_adapters=1)
        first, second, third = site.digests.values()
        for digest in (first, second):
            await busy.slots.hold(digest)
        for digest in (first, second):
            busy.slots.release(digest)
        busy.free.clear()
        loading = asyncio.ensure_future(busy.slots.hold(third))
        while first in busy.slots.digests:  # it is being removed
            await asyncio.sleep(0.01)
        again = asyncio.ensure_future(busy.slots.hold(second))
        await asyncio.sleep(0)
        busy.free.set()
        await asyncio.gather(loading, again)
        assert set(busy.model.slots) == {second, third}
        assert set(busy.slots.digests) == {second, third}

    asyncio.run(work())


@pytest.mark.parametrize("is_there", [True, False])
def test_a_caller_who_leaves_while_an_adapter_loads_harms_no_other(
    site: Site, is_there: bool
) -> None:
    async def work() -> None:
        busy = Busy(site, max_adapters=1)
        first, second, third = site.digests.values()
        left = first if is_there else "0" * 64
        busy.free.clear()
        caller = asyncio.ensure_future(busy.slots.hold(left))
        await asyncio.sleep(0.05)
        caller.cancel()
        with suppress(asyncio.CancelledError, UnusableAdapterError):
            await caller
        others = [asyncio.ensure_future(busy.slots.hold(digest)) for digest in (second, third)]
        await asyncio.sleep(0.05)
        busy.free.set()
        await asyncio.gather(*others)
        assert {second, third} <= set(busy.model.slots)
        for digest in (second, third):
            busy.slots.release(digest)
        if is_there:
            await busy.slots.hold(left)
            assert left in busy.model.slots
        else:
            with pytest.raises(UnusableAdapterError):
                await busy.slots.hold(left)

    asyncio.run(work())
