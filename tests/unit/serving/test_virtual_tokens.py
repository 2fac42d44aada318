"""Adapters of virtual tokens behind the native engine."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from graft.artifacts import AdapterRecord, Store
from graft.compressors.base import Adapter
from graft.compressors.folder import save_adapter
from graft.data.template import ChatTemplate
from graft.engine.multi import MultiAdapterModel
from graft.methods.prompt import PromptMethod
from graft.models.section import ModelSection
from graft.serving.engines.native import NativeEngine
from graft.serving.messages import Item, Job, Piece, Refused, Started
from graft.testing import tiny_model, tiny_tokenizer
from tests.unit.serving.conftest import BASE_DIGEST, READY

MESSAGES = ({"role": "user", "content": "put lamp to 7"},)
CONTEXT = 512


@pytest.fixture
def published(tmp_path: Path) -> tuple[Store, str]:
    method = PromptMethod(num_virtual_tokens=9)
    tensors = MultiAdapterModel(tiny_model()).fresh_tensors(method)
    save_adapter(tmp_path / "adapter", Adapter(method, tensors), "tiny")
    store = Store(tmp_path / "home")
    record = AdapterRecord(
        name="tiny", base_source="tiny", base_digest=BASE_DIGEST, method=method.type
    )
    return store, store.publish(tmp_path / "adapter", record)


def test_virtual_tokens_take_of_the_context_that_a_request_may_fill(
    published: tuple[Store, str],
) -> None:
    store, digest = published
    template = ChatTemplate(tiny_tokenizer())
    engine = NativeEngine(
        MultiAdapterModel(tiny_model()),
        template,
        store,
        ready=READY,
        section=ModelSection(source=READY.source),
        max_length=CONTEXT,
    )
    num_prompt = len(template.prompt_ids(MESSAGES, source="messages"))

    async def first(slot: str | None, max_tokens: int) -> Item:
        stream = engine.answer(Job("r", slot, MESSAGES, max_tokens, is_streamed=True))
        item = await anext(stream)
        await stream.aclose()
        return item

    async def whole() -> list[Item]:
        job = Job("r", digest, MESSAGES, 6, is_streamed=False)
        return [item async for item in engine.answer(job)]

    async def ask() -> None:
        room = CONTEXT - num_prompt
        assert isinstance(await first(None, room), Started)
        assert isinstance(await first(digest, room - 9), Started)
        refused = await first(digest, room - 8)
        assert isinstance(refused, Refused)
        assert refused.code == "context_length_exceeded"
        assert f"maximum context length is {CONTEXT - 9} tokens" in refused.message
        started, piece = await whole()
        assert isinstance(started, Started)
        assert isinstance(piece, Piece)
        assert piece.num_new_tokens == 6

    try:
        asyncio.run(ask())
    finally:
        engine.close()
