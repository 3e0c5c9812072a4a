from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from runner import errors
from runner.gateway.errors import describe
from runner.telemetry import GatewayMetrics
from tests.gateway.conftest import Client, client_of, spec_of
from tests.gateway.fakes import FakeDeployment, FakeDirectory


def tree(cls: type[errors.MlxRunError]) -> Iterator[type[errors.MlxRunError]]:
    yield cls
    for child in cls.__subclasses__():
        yield from tree(child)


@pytest.mark.parametrize("cls", list(tree(errors.RequestError)))
def test_every_request_error_has_its_status_and_shape(cls: type[errors.RequestError]) -> None:
    status, headers, body = describe(cls("what happened", param="field", code="why"))
    assert status == cls.status
    assert 400 <= status < 600
    assert json.loads(body) == {
        "error": {"message": "what happened", "type": cls.kind, "param": "field", "code": "why"}
    }
    assert ("Retry-After" in headers) == (status == 503)
    assert ("WWW-Authenticate" in headers) == (status == 401)


@pytest.mark.parametrize("cls", [errors.EngineLoadError, errors.EngineDied, errors.ListenerError, errors.RunnerError])
def test_what_is_no_request_error_is_a_server_error(cls: type[errors.MlxRunError]) -> None:
    status, _, body = describe(cls("the engine is gone"))
    assert (status, json.loads(body)["error"]["type"]) == (500, "server_error")


def test_what_is_not_ours_tells_nothing() -> None:
    status, _, body = describe(ValueError("/home/secret"))
    assert status == 500
    assert b"secret" not in body


@pytest.mark.parametrize(
    ("body", "content_type", "status", "message"),
    [
        (b"", "application/json", 400, "empty"),
        (b"{", "application/json", 400, "not valid JSON"),
        (b'{"model": NaN}', "application/json", 400, "not valid JSON"),
        (b'{"messages": [{"role": "user", "content": "hi"}]} trailing', "application/json", 400, "not valid JSON"),
        (b"[]", "application/json; charset=utf-8", 400, "expected `object`"),
        (b'{"model": "\xff"}', "application/json", 400, "UTF-8"),
        (b'{"model": "\\ud800"}', "application/json", 400, "not valid JSON"),
        (b'{"metadata": ' + b"[" * 100_000, "application/json", 400, "nested too deeply"),
        (b"{}", "text/plain", 415, "application/json"),
        (b"{}", "", 415, "application/json"),
        (b"a=b", "application/x-www-form-urlencoded", 415, "application/json"),
    ],
)
async def test_bodies_that_are_no_json_request(
    client: Client, body: bytes, content_type: str, status: int, message: str
) -> None:
    response = await client.post("/v1/chat/completions", body, content_type)
    assert response.status_code == status
    error = response.json["error"]
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        (
            "/v1/chat/completions",
            b'{"messages": [{"role": "king", "content": "hi"}]}',
            "`messages[0].role`: invalid enum value 'king'; it is one of assistant, developer, system, tool, user",
        ),
        (
            "/v1/chat/completions",
            b'{"messages": [{"role": "user", "content": "hi"}], "response_format": {"type": "xml"}}',
            "`response_format.type`: invalid value 'xml'; it is one of json_object, json_schema, text",
        ),
        ("/v1/chat/completions", b'{"messages": "hi"}', "`messages`: expected `array`, got `string`"),
        ("/v1/chat/completions", b'{"prompt": "hi"}', "unknown field `prompt`; it is one of /v1/completions"),
        ("/v1/completions", b'{"messages": []}', "unknown field `messages`; it is one of /v1/chat/completions"),
        ("/v1/responses", b'{"input": "a", "truncation": "some"}', "it is one of auto, disabled"),
        ("/v1/responses", b'{"input": [{"type": "nope"}]}', "`input[0].type`: invalid value 'nope'; it is one of "),
    ],
)
async def test_says_what_would_be_right(client: Client, path: str, body: bytes, message: str) -> None:
    response = await client.post(path, body, "application/json")
    assert response.status_code == 400
    assert message in response.json["error"]["message"]


async def test_a_wrong_method_is_told_the_right_one(client: Client) -> None:
    response = await client.get("/v1/chat/completions")
    assert response.status_code == 405
    assert response.json["error"]["message"] == "GET is not allowed on /v1/chat/completions; use POST"


async def test_unknown_path(client: Client) -> None:
    response = await client.get("/v1/nowhere")
    assert response.status_code == 404
    assert "/v1/nowhere" in response.json["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [("GET", "/v1/chat/completions", "POST"), ("POST", "/v1/models", "GET"), ("POST", "/health", "GET")],
)
async def test_wrong_method_keeps_allow(client: Client, method: str, path: str, allowed: str) -> None:
    response = await client.request(method, path)
    assert response.status_code == 405
    assert allowed in response.headers["allow"]
    assert response.json["error"]["type"] == "invalid_request_error"


async def test_a_bug_is_logged_and_not_told(
    client: Client, directory: FakeDirectory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("a secret of ours")

    monkeypatch.setattr(directory, "resolve", broken)
    response = await client.chat()
    assert response.status_code == 500
    assert "secret" not in response.text
    (record,) = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert record.message == "request handler failed"
    assert record.exc_info is not None
    assert vars(record)["request_id"] == response.headers["x-request-id"]


async def test_a_failing_engine_is_logged_and_a_loading_one_is_not(
    client: Client, deployment: FakeDeployment, caplog: pytest.LogCaptureFixture
) -> None:
    deployment.scripts = [[errors.EngineFailed("out of memory")], [errors.Unavailable("loading")]]
    await client.chat()
    await client.chat()
    (record,) = [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert vars(record)["error"] == "out of memory"


MESSAGES = b'"messages": [{"role": "user", "content": "hi"}]'
HOLDERS = {
    "/v1/chat/completions": MESSAGES + b', "tools": [{"function": {"name": "f", "parameters": %b}}], "max_tokens": 5',
    "/v1/responses": b'"input": "hi", "metadata": {"a": %b}',
    "/v1/messages": MESSAGES + b', "max_tokens": 5, "output_format": {"type": "json_schema", "schema": %b}',
    "/api/chat": MESSAGES + b', "stream": false, "format": %b',
}
"""Fields whose contents are the client's own, by path."""


@pytest.mark.parametrize("path", HOLDERS)
async def test_no_depth_of_a_body_is_a_fault_of_the_server(
    directory: FakeDirectory, metrics: GatewayMetrics, path: str
) -> None:
    """What the decoder just takes may be too deep for an encoder, further down the stack."""
    client = client_of(spec_of(apis=("openai", "anthropic", "ollama")), directory, metrics)
    statuses = []
    for depth in range(800, 1000):
        nested = b'{"a":' * depth + b"{}" + b"}" * depth
        statuses.append((await client.post(path, b'{"model": "chat", ' + HOLDERS[path] % nested + b"}")).status_code)
    assert set(statuses) == {200, 400}
