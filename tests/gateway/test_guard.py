from __future__ import annotations

import asyncio
from typing import Any

import pytest

from runner.gateway import call as call_module
from runner.gateway.exchange import Exchange
from runner.gateway.guard import CLIENT_LEFT
from runner.protocol import Delta
from runner.telemetry import GatewayMetrics
from tests.gateway.conftest import Client, client_of, events_of, spec_of
from tests.gateway.fakes import FakeDeployment, FakeDirectory

CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}
BODY = b'{"model": "chat", "messages": [{"role": "user", "content": "hi"}], "stream": true}'


async def test_health_is_open_and_touches_nothing(directory: FakeDirectory, metrics: GatewayMetrics) -> None:
    client = client_of(spec_of(api_keys=("secret",)), directory, metrics)
    response = await client.get("/health")
    assert (response.status_code, response.json) == (200, {"status": "ok"})
    head = await client.request("HEAD", "/health")
    assert (head.status_code, head.body) == (200, b"")
    assert directory.lookups == []


@pytest.mark.parametrize("path", ["/ready", "/metrics", "/v1/models", "/nowhere"])
async def test_everything_else_needs_a_key(directory: FakeDirectory, metrics: GatewayMetrics, path: str) -> None:
    client = client_of(spec_of(api_keys=("secret",)), directory, metrics)
    refused = await client.get(path)
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"] == "Bearer"
    assert refused.json["error"]["type"] == "authentication_error"
    assert refused.json["error"]["code"] == "invalid_api_key"
    assert (await client.get(path, authorization="Bearer secret")).status_code != 401


async def test_a_rebound_host_learns_nothing(client: Client) -> None:
    for path in ("/health", "/v1/models", CHAT):
        response = await client.get(path, host="evil.example:8080")
        assert response.status_code == 421
        assert response.json["error"]["code"] == "host_not_allowed"


async def test_large_headers(client: Client) -> None:
    response = await client.get("/health", x_big="a" * 40_000)
    assert (response.status_code, response.json["error"]["code"]) == (431, "headers_too_large")


async def test_a_body_is_counted_as_it_comes(directory: FakeDirectory, metrics: GatewayMetrics) -> None:
    client = client_of(spec_of(max_body_bytes=100), directory, metrics)
    announced = await client.post(CHAT, b" " * 101)
    at_once = await client.request("POST", CHAT, [b" " * 101], JSON)
    streamed = await client.request("POST", CHAT, [b" " * 60, b" " * 41], JSON)
    assert [r.status_code for r in (announced, at_once, streamed)] == [413, 413, 413]
    assert announced.json["error"] == at_once.json["error"] == streamed.json["error"]
    fits = await client.request("POST", CHAT, [BODY[:20], b"", BODY[20:]], JSON)
    assert fits.status_code == 200


async def test_a_body_that_does_not_come(
    directory: FakeDirectory, metrics: GatewayMetrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(call_module, "BODY_TIMEOUT", 0.01)
    client = client_of(spec_of(), directory, metrics)
    for pieces in ([], [b"{"]):
        response = await client.request("POST", CHAT, pieces, JSON, complete=False)
        assert (response.status_code, response.json["error"]["code"]) == (400, "body_timeout")


async def test_request_ids(client: Client) -> None:
    given = await client.get("/health", x_request_id="abc-1")
    assert given.headers["x-request-id"] == "abc-1"
    first, second = [(await client.get("/health")).headers["x-request-id"] for _ in range(2)]
    assert first != second
    for wrong in ("a" * 129, "näh"):
        made = (await client.get("/health", x_request_id=wrong)).headers["x-request-id"]
        assert made.startswith("req_")
    for response in (await client.get("/nowhere"), await client.chat(), await client.get("/", host="evil.example")):
        assert response.headers["x-request-id"].startswith("req_")


async def test_cors_reaches_answers_and_preflights(directory: FakeDirectory, metrics: GatewayMetrics) -> None:
    spec = spec_of(allow_origins=("https://app.example",), api_keys=("secret",))
    client = client_of(spec, directory, metrics)
    asked = {"origin": "https://app.example", "access-control-request-method": "POST"}
    preflight = await client.request("OPTIONS", CHAT, headers=asked)
    assert (preflight.status_code, preflight.body) == (204, b"")
    assert preflight.headers["access-control-allow-origin"] == "https://app.example"
    refused = await client.get("/v1/models", origin="https://app.example")
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://app.example", "a page may read why"
    stranger = await client.request("OPTIONS", CHAT, headers={**asked, "origin": "https://evil.example"})
    assert stranger.status_code == 401
    assert "access-control-allow-origin" not in stranger.headers


def waiting(deployment: FakeDeployment, *before: Any) -> asyncio.Event:
    """Has the deployment answer `before` and then wait for the event."""
    event = asyncio.Event()
    deployment.scripts = [[*before, event, [Delta(0, "late", 1, "stop")]]]
    return event


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("begun", [True, False])
async def test_a_client_that_leaves_closes_its_generator(
    client: Client, deployment: FakeDeployment, metrics: GatewayMetrics, stream: bool, begun: bool
) -> None:
    waiting(deployment, *([[Delta(0, "Hel", 1)]] if begun else []))
    left = asyncio.Event()
    body = BODY if stream else BODY.replace(b"true", b"false")
    request = asyncio.create_task(client.request("POST", CHAT, [body], JSON, left))
    await deployment.until("opened == 1")
    left.set()
    async with asyncio.timeout(60):
        answer = await request
    assert deployment.closed == 1
    assert b"late" not in answer.body
    assert client.guard.in_flight == 0
    assert metrics.requests.values == {("lm", CHAT, "chat", str(CLIENT_LEFT)): 1}


async def test_a_client_that_leaves_is_seen_whatever_way_its_body_came(
    client: Client, deployment: FakeDeployment
) -> None:
    """Granian ends a body with an empty piece, and Falcon does not read on once it has the announced length."""
    announced = {**JSON, "content-length": str(len(BODY))}
    for pieces, headers in (([BODY, b""], announced), ([BODY[:9], BODY[9:], b""], announced), ([BODY, b""], JSON)):
        waiting(deployment)
        left = asyncio.Event()
        request = asyncio.create_task(client.request("POST", CHAT, pieces, headers, left))
        await deployment.until("opened > closed")
        left.set()
        async with asyncio.timeout(60):
            await request
        assert deployment.opened == deployment.closed


@pytest.mark.parametrize("sent", [BODY, BODY[:20]])
async def test_a_client_that_leaves_before_its_body_is_complete_is_not_answered(
    client: Client, deployment: FakeDeployment, metrics: GatewayMetrics, sent: bytes
) -> None:
    """What has come may be JSON already: it is not a request yet, and nobody waits for its tokens."""
    waiting(deployment)
    left = asyncio.Event()
    left.set()
    headers = {**JSON, "content-length": str(len(BODY) + 1)}
    async with asyncio.timeout(60):
        answer = await client.request("POST", CHAT, [sent], headers, left, complete=False)
    assert (answer.status_code, answer.body) == (0, b"")
    assert deployment.requests == []
    assert client.guard.in_flight == 0
    assert metrics.requests.values == {("lm", CHAT, "", str(CLIENT_LEFT)): 1}


async def test_a_client_that_leaves_closes_all_of_n(client: Client, deployment: FakeDeployment) -> None:
    waiting(deployment, [Delta(0, "a", 1)])
    left = asyncio.Event()
    body = BODY.replace(b'"stream"', b'"n": 5, "stream"')
    request = asyncio.create_task(client.request("POST", CHAT, [body], JSON, left))
    await deployment.until("opened == 5")
    left.set()
    await request
    assert deployment.closed == 5


async def test_leaving_after_the_answer_is_complete_is_nothing(client: Client, metrics: GatewayMetrics) -> None:
    left = asyncio.Event()
    left.set()
    answer = await client.request("GET", "/v1/models", left=left)
    assert answer.status_code == 200
    assert metrics.requests.values == {("lm", "/v1/models", "", "200"): 1}


async def test_cut_answers_503_or_ends_the_stream_with_an_error(client: Client, deployment: FakeDeployment) -> None:
    waiting(deployment, [Delta(0, "Hel", 1)])
    begun = asyncio.create_task(client.request("POST", CHAT, [BODY], JSON))
    whole = asyncio.create_task(client.request("POST", CHAT, [BODY.replace(b"true", b"false")], JSON))
    await deployment.until("opened == 2")
    assert client.guard.in_flight == 2
    assert client.guard.cut() == 2
    await client.guard.wait_idle()
    assert deployment.closed == 2
    *_, last = events_of((await begun).text)
    assert last["error"]["code"] == "shutting_down"
    answer = await whole
    assert (answer.status_code, answer.json["error"]["code"]) == (503, "shutting_down")
    assert answer.headers["retry-after"] == "1"


async def test_a_cancel_of_the_task_itself_is_not_swallowed(client: Client, deployment: FakeDeployment) -> None:
    waiting(deployment)
    request = asyncio.create_task(client.request("POST", CHAT, [BODY], JSON))
    await deployment.until("opened == 1")
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    assert deployment.closed == 1


async def test_all_that_was_deferred_is_closed_though_one_fails(caplog: pytest.LogCaptureFixture) -> None:
    exchange = Exchange("req_1")
    closed: list[str] = []

    async def fail() -> None:
        raise RuntimeError("no")

    async def close() -> None:
        closed.append("first")

    exchange.defer(close)
    exchange.defer(fail)
    await exchange.close()
    assert closed == ["first"]
    assert "closing a request failed" in caplog.text
