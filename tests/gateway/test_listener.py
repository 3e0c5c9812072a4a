"""Real listeners on real ports."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from runner.errors import ListenerError
from runner.gateway import call as call_module
from runner.gateway.listener import Listener
from runner.protocol import Delta, Usage
from runner.telemetry import GatewayMetrics
from tests.gateway.conftest import Connect, spec_of
from tests.gateway.fakes import FakeDeployment, FakeDirectory
from tests.gateway.wire import Connection, chat, get

END = [Delta(0, "", 0, "stop", Usage(1, 1))]


async def health(listener: Listener) -> int:
    connection = await Connection.open(listener)
    await connection.send(get("/health"))
    status = await connection.status()
    await connection.close()
    return status


async def test_answers_on_the_port_it_tells(listener: Listener) -> None:
    assert listener.address[1] != 0
    assert await health(listener) == 200


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
async def test_ipv6(directory: FakeDirectory, metrics: GatewayMetrics) -> None:
    listener = Listener(spec_of(host="::1"), directory, metrics)
    await listener.start()
    assert await health(listener) == 200
    await listener.close(0)


async def test_localhost_is_127_0_0_1(directory: FakeDirectory, metrics: GatewayMetrics) -> None:
    listener = Listener(spec_of(host="localhost"), directory, metrics)
    await listener.start()
    _, writer = await asyncio.open_connection("127.0.0.1", listener.address[1])
    writer.close()
    await listener.close(0)


async def test_several_listeners_share_a_loop(directory: FakeDirectory, metrics: GatewayMetrics) -> None:
    listeners = [Listener(spec_of(name=f"l{i}"), directory, metrics) for i in range(3)]
    for listener in listeners:
        await listener.start()
    assert [await health(listener) for listener in listeners] == [200, 200, 200]
    await listeners[1].close(0)
    assert await health(listeners[0]) == 200
    assert await health(listeners[2]) == 200
    for listener in (listeners[0], listeners[2]):
        await listener.close(0)


async def test_a_taken_port_is_named(listener: Listener, directory: FakeDirectory, metrics: GatewayMetrics) -> None:
    port = listener.address[1]
    second = Listener(spec_of(port=port), directory, metrics)
    with pytest.raises(ListenerError, match=f"127.0.0.1:{port}.*another process") as caught:
        await second.start()
    assert "port" in caught.value.hint
    assert await health(listener) == 200


async def test_a_port_taken_by_a_server_with_reuseport_is_still_taken(
    directory: FakeDirectory, metrics: GatewayMetrics
) -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(ListenerError, match="another process"):
            await Listener(spec_of(port=other.getsockname()[1]), directory, metrics).start()


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.name.invalid"])
async def test_an_address_of_elsewhere(directory: FakeDirectory, metrics: GatewayMetrics, host: str) -> None:
    with pytest.raises(ListenerError, match=f"{host}:8080") as caught:
        await Listener(spec_of(host=host, port=8080), directory, metrics).start()
    assert "host" in caught.value.hint


async def test_the_port_is_free_at_once_after_closing(directory: FakeDirectory, metrics: GatewayMetrics) -> None:
    port = 0
    for _ in range(5):
        listener = Listener(spec_of(port=port), directory, metrics)
        await listener.start()
        port = listener.address[1]
        assert await health(listener) == 200  # leaves a connection in TIME_WAIT
        await listener.close(0)
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)


async def test_opening_and_closing_leaks_no_descriptor(directory: FakeDirectory, metrics: GatewayMetrics) -> None:
    counts = []
    for _ in range(6):
        listener = Listener(spec_of(), directory, metrics)
        await listener.start()
        await health(listener)
        await listener.close(0)
        counts.append(len(list(Path("/dev/fd").iterdir())))
    assert counts[-1] <= counts[1]


async def test_signals_and_logging_are_left_alone(
    directory: FakeDirectory, metrics: GatewayMetrics, capfd: pytest.CaptureFixture[str]
) -> None:
    handler = logging.StreamHandler()
    logging.getLogger().addHandler(handler)
    before = (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), list(logging.getLogger().handlers))
    listener = Listener(spec_of(), directory, metrics)
    await listener.start()
    await health(listener)
    await listener.close(0)
    after = (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), list(logging.getLogger().handlers))
    logging.getLogger().removeHandler(handler)
    assert before == after
    assert logging.getLogger("_granian").handlers == [], "what Granian logs goes where ours goes"
    assert capfd.readouterr().out == ""


async def test_close_lets_streams_finish(connect: Connect, listener: Listener, deployment: FakeDeployment) -> None:
    finish = asyncio.Event()
    deployment.scripts = [[[Delta(0, "Hel", 1)], finish, [Delta(0, "lo", 1)], END]]
    streaming = await connect(listener)
    idle = await connect(listener)
    await idle.send(get("/health"))
    assert await idle.status() == 200
    await streaming.send(chat(stream=True))
    await streaming.until(b"Hel")
    closing = asyncio.create_task(listener.close(60))
    await idle.until(b"}")
    assert await idle.rest() == b"", "an idle connection is closed at once"
    with pytest.raises(ConnectionRefusedError):
        await connect(listener)
    assert not closing.done()
    finish.set()
    assert b"[DONE]" in await streaming.rest()
    assert await closing == 0
    assert deployment.closed == 1


async def test_close_cuts_what_is_late(connect: Connect, listener: Listener, deployment: FakeDeployment) -> None:
    deployment.scripts = [[[Delta(0, "Hel", 1)], asyncio.Event()]]
    streaming = await connect(listener)
    whole = await connect(listener)
    uploading = await connect(listener)
    await streaming.send(chat(stream=True))
    await whole.send(chat())
    await uploading.send(chat()[:-5])
    await streaming.until(b"Hel")
    await deployment.until("opened == 2")
    async with asyncio.timeout(60):
        while listener.in_flight < 3:
            await asyncio.sleep(0.001)
    cut = await listener.close(0.05)
    assert cut == 3
    assert b"shutting_down" in await streaming.rest()
    assert await whole.status() == 503
    assert await uploading.status() == 503
    assert (deployment.opened, deployment.closed) == (2, 2)


async def test_close_does_not_wait_for_a_client_that_does_not_read(
    connect: Connect, listener: Listener, deployment: FakeDeployment
) -> None:
    """Its stream is stuck in the middle, and so is whatever would be said to it at the end."""
    deployment.scripts = [[[Delta(0, "x" * 1_000_000, 1)]] * 64]
    connection = await connect(listener)
    connection.writer.transport.pause_reading()  # type: ignore[attr-defined]
    await connection.send(chat(stream=True))
    await deployment.until("opened == 1")
    async with asyncio.timeout(60):
        assert await listener.close(0.1) == 1
    assert deployment.closed == 1


async def test_close_does_not_wait_for_half_a_request(connect: Connect, listener: Listener) -> None:
    half = await connect(listener)
    await half.send(b"GET /health HT")
    async with asyncio.timeout(60):
        assert await listener.close(100) == 0
    with pytest.raises(ConnectionRefusedError):
        await connect(listener)


SERVE_AND_END = """
import asyncio, sys
from runner.gateway.listener import Listener
from runner.telemetry import GatewayMetrics
from tests.gateway.conftest import spec_of
from tests.gateway.fakes import FakeDirectory
from tests.gateway.wire import chat

async def main():
    listener = Listener(spec_of(), FakeDirectory(), GatewayMetrics())
    await listener.start()
    _, idle = await asyncio.open_connection(*listener.address)
    _, writer = await asyncio.open_connection(*listener.address)
    writer.write(chat()[:-5])
    while not listener.in_flight:
        await asyncio.sleep(0.001)
    assert await listener.close(0) == 1

asyncio.run(main())
"""


def test_a_process_that_closes_its_listener_ends_without_a_word() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SERVE_AND_END], capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


async def test_update_in_place(connect: Connect, listener: Listener, directory: FakeDirectory) -> None:
    port = listener.address[1]
    connection = await connect(listener)
    await connection.send(get("/v1/models"))
    assert await connection.status() == 200
    await connection.until(b"]}")
    listener.update(spec_of(api_keys=("secret",), apis=()))
    await connection.send(get("/v1/models"))
    assert await connection.status() == 401, "on the connection that was open already"
    listener.update(spec_of(apis=()))
    connection = await connect(listener)
    await connection.send(get("/v1/models"))
    assert await connection.status() == 404
    listener.update(spec_of())
    connection = await connect(listener)
    await connection.send(get("/v1/models"))
    assert await connection.status() == 200
    assert listener.address[1] == port


@pytest.fixture
async def small(directory: FakeDirectory, metrics: GatewayMetrics) -> AsyncIterator[Listener]:
    listener = Listener(spec_of(max_body_bytes=1_000_000), directory, metrics)
    await listener.start()
    yield listener
    await listener.close(0)


async def test_limits_of_headers(connect: Connect, small: Listener) -> None:
    for request, status in (
        (b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"a" * 40_000 + b"\r\n\r\n", 431),
        (b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"X: a\r\n" * 120 + b"\r\n", 431),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 414),
        (b"GET /health HTTP/1.1\r\n\r\n", 421),
        (b"nonsense\r\n\r\n", 400),
    ):
        connection = await connect(small)
        await connection.send(request)
        assert await connection.status() == status, request[:40]
    assert await health(small) == 200


async def too_large(connection: Connection) -> None:
    """Begins a chunked body over the limit, and does not end it."""
    await connection.send(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n"
    )
    for _ in range(5):
        await connection.send(b"40000\r\n" + b" " * 0x40000 + b"\r\n")


async def test_a_chunked_body_over_the_limit(connect: Connect, small: Listener, deployment: FakeDeployment) -> None:
    connection = await connect(small)
    await too_large(connection)
    await connection.send(b"0\r\n\r\n")
    assert await connection.status() == 413
    assert deployment.requests == []


async def test_a_body_over_the_limit_that_does_not_end(
    connect: Connect, small: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(call_module, "DRAIN_SECONDS", 0.05)
    connection = await connect(small)
    await too_large(connection)
    assert await connection.status() == 413


@pytest.mark.parametrize("announced", [True, False])
async def test_clients_that_send_all_before_they_look_see_the_413(small: Listener, announced: bool) -> None:
    body = b'{"messages": "' + b"x" * 20_000_000 + b'"}'

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 1_000_000):
            yield body[start : start + 1_000_000]

    url = f"http://127.0.0.1:{small.address[1]}/v1/chat/completions"
    async with httpx.AsyncClient() as client:
        for _ in range(3):
            content = body if announced else pieces()
            response = await client.post(url, content=content, headers={"content-type": "application/json"})
            assert response.status_code == 413
            assert response.json()["error"]["code"] == "body_too_large"


async def test_pipelined_requests_on_one_connection(connect: Connect, listener: Listener) -> None:
    connection = await connect(listener)
    await connection.send(get("/health") + get("/v1/models") + chat())
    for _ in range(3):
        assert await connection.status() == 200
        await connection.until(b"}")


async def test_http_1_0_as_proxies_speak_it(connect: Connect, listener: Listener) -> None:
    """nginx, unless told otherwise; an answer in pieces ends with the connection then."""
    for request in (get("/v1/models"), chat(), chat(stream=True)):
        connection = await connect(listener)
        await connection.send(request.replace(b"HTTP/1.1", b"HTTP/1.0"))
        assert await connection.status() == 200
        assert await connection.rest() != b""


@pytest.mark.parametrize("path", ["/ready", "/metrics", "/v1/models", "/v1/models/chat", "/docs", "/openapi.json"])
async def test_head_is_get_without_its_body(connect: Connect, listener: Listener, path: str) -> None:
    connection = await connect(listener)
    await connection.send(get(path).replace(b"GET", b"HEAD") + get("/health"))
    assert await connection.status() == 200
    assert await connection.status() == 200
    assert await connection.until(b"}") == b'{"status":"ok"}'


async def test_head_where_there_is_no_get(connect: Connect, listener: Listener) -> None:
    connection = await connect(listener)
    await connection.send(get("/v1/chat/completions").replace(b"GET", b"HEAD"))
    assert await connection.status() == 405
