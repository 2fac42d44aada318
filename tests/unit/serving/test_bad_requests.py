"""What a hostile or careless caller may send, and what it gets."""

from __future__ import annotations

import json
from typing import Any

import pytest

from graft.core.errors import ConfigError
from graft.recipe.operation import TenantSection
from graft.serving.door import MAX_BODY_BYTES
from graft.serving.tenants import read_tenants
from tests.unit.serving.conftest import ALICE, BOB, KEYS, TENANTS, Site

CHAT = "/v1/chat/completions"
GOOD: dict[str, Any] = {"model": "lamps", "messages": [{"role": "user", "content": "hello"}]}
HEADERS = {"Authorization": f"Bearer {ALICE}", "Content-Type": "application/json"}


def post(site: Site, content: bytes | str, **headers: str) -> Any:
    return site.send("POST", CHAT, content=content, headers={**HEADERS, **headers})


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"model": None}, "model", "given None"),
        ({"model": ""}, "model", "at least 1"),
        ({"model": 7}, "model", "given 7"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "hello"}, "messages", "array"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "'robot'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "Missing"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "given 5"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "messages[0].content[0].type",
            "'image_url'",
        ),
        ({"max_tokens": 0}, "max_tokens", "given 0"),
        ({"max_tokens": -1}, "max_tokens", "given -1"),
        ({"max_tokens": 10**9}, "max_tokens", "given 1000000000"),
        ({"max_tokens": 4, "max_completion_tokens": 4}, "max_tokens", "one of them"),
        ({"temperature": -1}, "temperature", "given -1"),
        ({"temperature": 2.5}, "temperature", "given 2.5"),
        ({"temperature": "0"}, "temperature", "given '0'"),
        ({"top_p": 0}, "top_p", "given 0"),
        ({"n": 10**9}, "n", "given 1000000000"),
        ({"stop": ["x"] * 1000}, "stop", "at most 4"),
        ({"stop": ""}, "stop", "at least 1"),
        ({"logprobs": True}, "logprobs", "given True"),
        ({"response_format": {"type": "json_schema"}}, "response_format.type", "json_schema"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream is true"),
        ({"lora_path": "/etc"}, "lora_path", "Unrecognized"),
        ({"trust_remote_code": True}, "trust_remote_code", "Unrecognized"),
        ({"prompt_embeds": "x"}, "prompt_embeds", "Unrecognized"),
    ],
)
def test_a_wrong_field_is_400_in_words(
    calm_site: Site, change: dict[str, Any], param: str | None, words: str
) -> None:
    response = post(calm_site, json.dumps({**GOOD, **change}))
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["type"] == "invalid_request_error"
    assert words in error["message"]
    if param is not None:
        assert error["param"] == param


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not json",
        b"[]",
        b'"text"',
        b'{"model": "lamps", "model": "doors"}',
        b'{"temperature": NaN}',
        b'{"temperature": Infinity}',
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"\xff\xfe\x00",
        b'{"model": "\xff"}',
    ],
)
def test_a_body_that_is_no_json_object_is_400(calm_site: Site, content: bytes) -> None:
    response = post(calm_site, content)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_json"


def test_a_missing_field_is_named(calm_site: Site) -> None:
    error = post(calm_site, json.dumps({"messages": GOOD["messages"]})).json()["error"]
    assert (error["code"], error["param"]) == ("missing_required_parameter", "model")


def test_a_conversation_that_the_template_refuses_is_400(calm_site: Site) -> None:
    messages = [{"role": "assistant", "content": "I start"}]
    response = post(calm_site, json.dumps({**GOOD, "messages": messages}))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages"


def test_text_parts_are_joined(calm_site: Site) -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    split = {**GOOD, "messages": [{"role": "user", "content": parts}], "max_tokens": 6}
    answers = [
        post(calm_site, json.dumps(body)).json()["choices"][0]["message"]["content"]
        for body in (split, {**GOOD, "max_tokens": 6})
    ]
    assert answers[0] == answers[1]


def test_control_tokens_in_a_message_do_not_end_the_turn(calm_site: Site) -> None:
    def num_prompt_tokens(content: str) -> int:
        body = {**GOOD, "messages": [{"role": "user", "content": content}], "max_tokens": 1}
        return int(post(calm_site, json.dumps(body)).json()["usage"]["prompt_tokens"])

    assert num_prompt_tokens("<|im_end|>") > num_prompt_tokens("x") + 2


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer sk-wrong",
        f"Basic {ALICE}",
        ALICE,
        f"Bearer {ALICE}x",
        f"Bearer {ALICE[:-1]}",
        f"Bearer {ALICE} {BOB}",
    ],
)
def test_without_a_right_key_everything_but_health_is_401(
    calm_site: Site, authorization: str | None
) -> None:
    headers = {} if authorization is None else {"Authorization": authorization}
    for method, path in (
        ("POST", CHAT),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/lamps"),
        ("GET", "/docs"),
        ("GET", "/openapi.json"),
        ("GET", "/health/"),
        ("OPTIONS", CHAT),
    ):
        response = calm_site.send(method, path, headers=headers)
        assert response.status_code == 401, path
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"].startswith("Bearer")


def test_two_keys_at_once_are_401(calm_site: Site) -> None:
    headers = [("Authorization", f"Bearer {ALICE}"), ("Authorization", f"Bearer {BOB}")]
    assert calm_site.send("GET", "/v1/models", headers=headers).status_code == 401


def test_a_host_header_moves_no_decision(calm_site: Site) -> None:
    for host in ("x/health?", "x/#", "graft/health"):
        response = calm_site.send("GET", "/v1/models", headers={"Host": host})
        assert response.status_code == 401


@pytest.mark.parametrize(
    "model",
    [
        "doors",
        "nothing",
        "lamps@nothing",
        "lamps@",
        "@champion",
        "../lamps",
        "/etc/passwd",
        "lamps/1",
        "..",
        "%2e%2e",
        "lamps\x00",
        "l\u0430mps",  # a Cyrillic letter
        "latest",
        "lamps@" + "0" * 12,
    ],
)
def test_unknown_and_forbidden_models_get_one_answer(calm_site: Site, model: str) -> None:
    response = post(calm_site, json.dumps({**GOOD, "model": model}))
    error = response.json()["error"]
    assert response.status_code == 404
    assert error == {
        "message": f"The model {model!r} does not exist or you do not have access to it.",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }


def test_unknown_routes_and_methods_are_refused_in_openai_shape(calm_site: Site) -> None:
    for method, path, status in (
        ("GET", "/", 404),
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404),
        ("POST", "/v1/completions", 404),
        ("POST", CHAT + "/", 404),
        ("GET", CHAT, 405),
        ("DELETE", "/v1/models/lamps", 405),
    ):
        response = calm_site.send(method, path, headers=HEADERS)
        assert response.status_code == status, path
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_bodies_are_bounded_whether_their_length_is_told_or_not(calm_site: Site) -> None:
    big = b"x" * (MAX_BODY_BYTES + 1)
    assert post(calm_site, big).status_code == 413

    async def chunks() -> Any:
        for _ in range(9):
            yield b" " * (MAX_BODY_BYTES // 8)

    async def endless() -> Any:
        async with calm_site.client() as client:
            return await client.post(CHAT, content=chunks(), headers=HEADERS)

    assert calm_site.run(endless()).status_code == 413


def test_compressed_and_mistyped_bodies_are_refused(calm_site: Site) -> None:
    body = json.dumps(GOOD)
    assert post(calm_site, body, **{"Content-Encoding": "gzip"}).status_code == 400
    assert post(calm_site, body, **{"Content-Type": "text/plain"}).status_code == 400


def test_a_request_id_is_kept_where_harmless_and_made_where_not(calm_site: Site) -> None:
    def answered(given: str) -> str:
        headers = {**HEADERS, "x-request-id": given}
        return str(calm_site.send("GET", "/v1/models", headers=headers).headers["x-request-id"])

    assert answered("abc-123") == "abc-123"
    assert answered("a b") != "a b"
    assert answered("x" * 1000).startswith("req-")


def test_keys_are_read_from_the_environment_or_refused_in_words() -> None:
    with pytest.raises(ConfigError, match="GRAFT_KEY_BOB, which is not set"):
        read_tenants(TENANTS, {"GRAFT_KEY_ALICE": ALICE})
    with pytest.raises(ConfigError, match="also that of 'alice'"):
        read_tenants(TENANTS, dict.fromkeys(KEYS, ALICE))
    with pytest.raises(ConfigError, match="nobody could call"):
        read_tenants((), KEYS)
    with pytest.raises(ConfigError, match="printable ASCII") as odd:
        read_tenants(TENANTS[:1], {"GRAFT_KEY_ALICE": "schlüssel-0123456789"})
    assert "schlüssel" not in str(odd.value)


def test_tenants_hold_no_key(caplog: pytest.LogCaptureFixture) -> None:
    short = TenantSection(name="carol", key_env="K", models=())
    (tenant,) = read_tenants((short,), {"K": "sk-short"})
    assert "sk-short" not in repr(vars(tenant))
    assert "sk-short" not in caplog.text
    assert "shorter than" in caplog.text
