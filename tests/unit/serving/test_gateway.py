"""The chat API over a real engine on the tiny model, without Ray."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from fastapi.responses import StreamingResponse

from graft.artifacts import Store
from graft.compressors.folder import load_adapter
from graft.core.errors import ServingError
from graft.data.template import ChatTemplate
from graft.engine.generate import GenerationRequest, Generator
from graft.engine.multi import MultiAdapterModel
from graft.serving.gateway import _Answer
from graft.serving.messages import Job
from graft.serving.requests import parse_chat_request
from graft.testing import tiny_model, tiny_tokenizer
from tests.unit.serving.conftest import ALICE, BOB, MAX_LENGTH, Site, publish

MESSAGES = [{"role": "user", "content": "put lamp to 7"}]


def expected(store: Store, digest: str | None, max_tokens: int = 8) -> str:
    """The answer that the engine itself gives to `MESSAGES`."""
    template = ChatTemplate(tiny_tokenizer())
    model = MultiAdapterModel(tiny_model())
    if digest is not None:
        adapter = load_adapter(store.open(digest).path)
        model.add_slot("slot", adapter.method, tensors=adapter.tensors)
    request = GenerationRequest(
        template.prompt_ids(MESSAGES),
        slot=digest and "slot",
        max_new_tokens=max_tokens,
        stop_ids=template.stop_ids,
    )
    return Generator(model, template.tokenizer).run([request])[0].text


def frames(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def test_an_answer_names_the_immutable_version_that_gave_it(site: Site) -> None:
    response = site.chat()
    version = f"lamps@{site.digests['lamps'][:12]}"
    body = response.json()
    assert response.status_code == 200
    assert body["model"] == version
    assert response.headers["x-graft-adapter-version"] == version
    assert response.headers["x-request-id"].startswith("req-")
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"]["content"] == expected(site.store, site.digests["lamps"])
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert body["choices"][0]["finish_reason"] in ("stop", "length")


def test_each_model_answers_with_its_own_adapter(site: Site) -> None:
    for key, model, digest in (
        (ALICE, "lamps", site.digests["lamps"]),
        (BOB, "doors", site.digests["doors"]),
        (ALICE, "base", None),
        (ALICE, "org/tiny", None),
        (ALICE, "lamps@champion", site.digests["lamps"]),
        (ALICE, f"lamps@{site.digests['lamps'][:12]}", site.digests["lamps"]),
    ):
        content = site.chat(key=key, model=model).json()["choices"][0]["message"]["content"]
        assert content == expected(site.store, digest), model


def test_a_stream_says_the_same_as_a_whole_answer(site: Site) -> None:
    whole = site.chat(max_tokens=20).json()
    response = site.chat(max_tokens=20, stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = frames(response.text)
    assert chunks[-1] == "[DONE]"
    assert chunks[-2]["choices"] == []
    assert chunks[-2]["usage"] == whole["usage"]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-2]]
    assert deltas[0]["role"] == "assistant"
    text = "".join(delta.get("content", "") for delta in deltas)
    assert text == whole["choices"][0]["message"]["content"]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-2]]
    assert reasons[-1] == whole["choices"][0]["finish_reason"]
    assert set(reasons[:-1]) == {None}
    assert {chunk["model"] for chunk in chunks[:-1]} == {f"lamps@{site.digests['lamps'][:12]}"}


def test_promotion_and_rollback_act_on_the_next_request(site: Site) -> None:
    before = site.chat().json()
    version = site.store.register("lamps", site.digests["other"])
    site.store.promote("lamps", version)
    promoted = site.chat().json()
    assert promoted["model"] == f"lamps@{site.digests['other'][:12]}"
    assert promoted["choices"][0]["message"]["content"] == expected(
        site.store, site.digests["other"]
    )
    site.store.rollback("lamps")
    assert site.chat().json()["model"] == before["model"]


def test_models_lists_only_what_the_key_may_use(site: Site) -> None:
    def listed(key: str) -> list[str]:
        headers = {"Authorization": f"Bearer {key}"}
        return [m["id"] for m in site.send("GET", "/v1/models", headers=headers).json()["data"]]

    assert listed(ALICE) == ["base", "lamps"]
    assert listed(BOB) == ["doors"]
    bob = {"Authorization": f"Bearer {BOB}"}
    card = site.send("GET", "/v1/models/doors", headers=bob).json()
    assert card["version"] == f"doors@{site.digests['doors'][:12]}"
    assert card["parent"] == "org/tiny"
    assert "path" not in json.dumps(card)
    assert site.send("GET", "/v1/models/lamps", headers=bob).status_code == 404


def test_health_needs_no_key_and_says_nothing_else(site: Site) -> None:
    response = site.send("GET", "/health")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})


def test_a_damaged_adapter_is_503_for_its_tenant_alone(site: Site) -> None:
    path = site.store.open(site.digests["lamps"]).path / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))
    response = site.chat()
    assert response.status_code == 503
    error = response.json()["error"]
    assert error["code"] == "adapter_unavailable"
    assert "damaged" in error["message"]
    assert str(path.parent.parent) not in error["message"]
    assert site.chat(key=BOB, model="doors").status_code == 200


def test_an_adapter_that_was_removed_or_fits_another_base_is_503(
    site: Site, tmp_path: Path
) -> None:
    foreign = publish(site.store, tmp_path, r=2, seed=9, base="c" * 64)
    site.store.promote("lamps", site.store.register("lamps", foreign))
    assert site.chat().json()["error"]["code"] == "adapter_unavailable"
    foreign = publish(site.store, tmp_path, r=2, seed=10, template="d" * 64)
    site.store.promote("lamps", site.store.register("lamps", foreign))
    assert site.chat().json()["error"]["code"] == "adapter_unavailable", "another chat template"
    folder = site.store.open(site.digests["doors"]).path
    folder.rename(folder.with_name("elsewhere"))
    assert site.chat(key=BOB, model="doors").status_code == 503
    folder.with_name("elsewhere").rename(folder)
    assert site.chat(key=BOB, model="doors").status_code == 200


def test_unused_adapters_leave_when_more_come_than_fit(site: Site) -> None:
    site.chat()
    site.chat(key=BOB, model="doors")
    assert set(site.engine.adapters) == {site.digests["lamps"], site.digests["doors"]}
    site.store.promote("lamps", site.store.register("lamps", site.digests["other"]))
    site.chat()
    assert set(site.engine.adapters) == {site.digests["doors"], site.digests["other"]}
    site.store.rollback("lamps")
    content = site.chat().json()["choices"][0]["message"]["content"]
    assert content == expected(site.store, site.digests["lamps"])


def test_more_requests_than_fit_are_429_and_the_others_are_answered(site: Site) -> None:
    async def burst() -> list[Any]:
        body = {"model": "lamps", "messages": MESSAGES, "max_tokens": 30}
        headers = {"Authorization": f"Bearer {ALICE}"}
        async with site.client() as client:
            return await asyncio.gather(
                *(
                    client.post("/v1/chat/completions", json=body, headers=headers)
                    for _ in range(12)
                )
            )

    responses = site.run(burst())
    refused = [response for response in responses if response.status_code == 429]
    assert len(refused) == 4
    assert refused[0].headers["retry-after"] == "1"
    error = refused[0].json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    answers = {
        response.json()["choices"][0]["message"]["content"]
        for response in responses
        if response.status_code == 200
    }
    assert answers == {expected(site.store, site.digests["lamps"], 30)}
    assert site.chat().status_code == 200


def test_a_caller_who_leaves_frees_the_place(site: Site) -> None:
    async def leave() -> None:
        stream = site.engine.answer(job(max_tokens=80))
        await anext(stream)
        await anext(stream)
        await stream.aclose()
        for _ in range(200):
            if site.engine._generator.is_idle and not site.engine._open:
                return
            await asyncio.sleep(0.02)
        raise AssertionError("the request still runs")

    def job(max_tokens: int) -> Job:
        return Job("r", site.digests["lamps"], tuple(MESSAGES), max_tokens, is_streamed=True)

    site.run(leave())


def test_an_http_disconnect_in_mid_stream_cancels_the_request(site: Site) -> None:
    body = json.dumps(
        {"model": "lamps", "messages": MESSAGES, "max_tokens": 80, "stream": True}
    ).encode()
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/chat/completions",
        "raw_path": b"/v1/chat/completions",
        "query_string": b"",
        "headers": [
            (b"content-type", b"application/json"),
            (b"authorization", f"Bearer {ALICE}".encode()),
        ],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
        "scheme": "http",
        "root_path": "",
    }

    async def leave() -> None:
        has_chunk = asyncio.Event()
        sent: list[Any] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            if sent:
                return sent.pop()
            await has_chunk.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body" and b"content" in message["body"]:
                has_chunk.set()

        await site.gateway.app()(scope, receive, send)

    site.run(leave())
    assert [served.code for served in site.served] == [499]
    assert site.served[0].num_new_tokens < 75


def test_an_engine_that_breaks_in_mid_stream_ends_it_with_an_error_frame(site: Site) -> None:
    resolved = site.gateway.catalog.resolve("lamps", site.gateway.tenants[0])
    asked = parse_chat_request(
        json.dumps({"model": "lamps", "messages": MESSAGES, "stream": True}).encode()
    )

    async def read() -> list[Any]:
        answer = _Answer(site.gateway, site.gateway.tenants[0], resolved, asked, "req-1")
        response = await answer.respond()
        assert isinstance(response, StreamingResponse)
        seen = ""
        async for part in response.body_iterator:
            seen += str(part)
            if '"content": "' in seen:
                site.engine.model.slots.pop(site.digests["lamps"], None)
        return frames(seen)

    seen = site.run(read())
    assert "[DONE]" not in seen
    assert seen[-1]["error"]["type"] == "server_error"
    assert "incomplete" in seen[-1]["error"]["message"]
    assert [served.code for served in site.served] == [502]


def test_what_is_measured_holds_no_text_and_no_key(site: Site) -> None:
    site.chat()
    site.chat(key=BOB, model="doors", stream=True)
    assert [s.code for s in site.served] == [200, 200]
    assert site.served[0].tenant == "alice"
    assert site.served[1].version == f"doors@{site.digests['doors'][:12]}"
    assert all(s.ttft_s is not None and s.ttft_s <= s.e2e_s for s in site.served)
    assert ALICE not in repr(site.served)
    assert ALICE not in repr(site.gateway.tenants)


def test_tenants_in_one_batch_each_get_their_own_answer(site: Site) -> None:
    async def both() -> list[Any]:
        async with site.client() as client:
            return await asyncio.gather(
                *(
                    client.post(
                        "/v1/chat/completions",
                        json={"model": model, "messages": MESSAGES, "max_tokens": 20},
                        headers={"Authorization": f"Bearer {key}"},
                    )
                    for key, model in ((ALICE, "lamps"), (BOB, "doors"), (ALICE, "base"))
                )
            )

    answers = [r.json()["choices"][0]["message"]["content"] for r in site.run(both())]
    digests = (site.digests["lamps"], site.digests["doors"], None)
    assert answers == [expected(site.store, digest, 20) for digest in digests]
    assert len(set(answers)) == 3


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_context_that_is_too_long_is_400(site: Site, is_streamed: bool) -> None:
    for body in (
        {"messages": [{"role": "user", "content": "long " * 300}]},
        {"max_tokens": MAX_LENGTH},
    ):
        response = site.chat(stream=is_streamed, **body)
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "context_length_exceeded"


def test_a_broken_step_fails_its_requests_and_the_next_are_answered(site: Site) -> None:
    async def ask() -> str:
        stream = site.engine.answer(
            Job("r", site.digests["lamps"], tuple(MESSAGES), 80, is_streamed=True)
        )
        await anext(stream)
        # The adapter vanishes from under a running request, which no caller can bring about.
        site.engine.model.slots.pop(site.digests["lamps"])
        with pytest.raises(ServingError, match="step failed"):
            async for _ in stream:
                pass
        return "failed"

    assert site.run(ask()) == "failed"
    assert site.chat(key=BOB, model="doors").status_code == 200
