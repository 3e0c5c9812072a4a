from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import pytest

from runner.gateway.app import build_app
from runner.gateway.guard import Guard
from runner.gateway.listener import Listener
from runner.gateway.policy import Policy
from runner.plan.spec import ListenerSpec
from runner.telemetry import GatewayMetrics
from tests.gateway.fakes import FakeControl, FakeDeployment, FakeDirectory
from tests.gateway.wire import Connection


@pytest.fixture
def directory() -> FakeDirectory:
    return FakeDirectory()


@pytest.fixture
def deployment(directory: FakeDirectory) -> FakeDeployment:
    return directory.deployment


@pytest.fixture
def metrics() -> GatewayMetrics:
    return GatewayMetrics()


@dataclass
class Answer:
    """What came back."""

    status_code: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Client:
    """Speaks ASGI to a guarded app in this process: for the API's shape, without sockets.

    (Falcon's own test client disconnects as soon as the body is sent, which the guard rightly takes for a client that
    left.)
    """

    guard: Guard

    async def request(
        self,
        method: str,
        path: str,
        body: Iterable[bytes] = (b"",),
        headers: Mapping[str, str] | None = None,
        left: asyncio.Event | None = None,
        complete: bool = True,
    ) -> Answer:
        path, _, query = path.partition("?")
        sent = {"host": "127.0.0.1:8080", **(headers or {})}
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "path": unquote(path),
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "scheme": "http",
            "server": ("127.0.0.1", "8080"),
            "client": ("127.0.0.1", 50000),
            "headers": [(name.encode(), value.encode("latin-1")) for name, value in sent.items()],
        }
        pieces = list(body)
        messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
        if complete:
            messages[-1]["more_body"] = False
        answer = Answer(0, {}, b"")

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop(0)
            await (left or asyncio.Event()).wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                answer.status_code = message["status"]
                answer.headers = {name.decode(): value.decode("latin-1") for name, value in message["headers"]}
            answer.body += message.get("body", b"")

        await self.guard(scope, receive, send)
        return answer

    async def get(self, path: str, **headers: str) -> Answer:
        return await self.request("GET", path, headers={n.replace("_", "-"): v for n, v in headers.items()})

    async def post(self, path: str, body: Any, content_type: str = "application/json") -> Answer:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": content_type, "content-length": str(len(raw))}
        return await self.request("POST", path, [raw], headers)

    async def chat(self, **fields: Any) -> Answer:
        body = {"model": "chat", "messages": [{"role": "user", "content": "hi"}], **fields}
        return await self.post("/v1/chat/completions", body)

    async def complete(self, **fields: Any) -> Answer:
        return await self.post("/v1/completions", {"model": "chat", "prompt": "once", **fields})


def client_of(
    spec: ListenerSpec, directory: FakeDirectory, metrics: GatewayMetrics, control: FakeControl | None = None
) -> Client:
    return Client(Guard(spec.name, Policy(spec), build_app(spec, directory, metrics, control), metrics))


@pytest.fixture
def client(directory: FakeDirectory, metrics: GatewayMetrics) -> Client:
    return client_of(spec_of(), directory, metrics)


def spec_of(**fields: Any) -> ListenerSpec:
    return ListenerSpec(**{"name": "lm", "host": "127.0.0.1", "port": 0, "models": ("chat",), **fields})


def events_of(text: str) -> list[Any]:
    """The data of each event of a stream, decoded; `[DONE]` as it is."""
    assert text.endswith("\n\n"), "a stream ends with a whole event"
    data = [event.removeprefix("data: ") for event in text.removesuffix("\n\n").split("\n\n")]
    return [item if item == "[DONE]" else json.loads(item) for item in data]


@pytest.fixture
async def listener(directory: FakeDirectory, metrics: GatewayMetrics) -> AsyncIterator[Listener]:
    """A real listener on a free port."""
    listener = Listener(spec_of(), directory, metrics)
    await listener.start()
    yield listener
    await listener.close(0)


Connect = Callable[[Listener], Awaitable[Connection]]


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    """Opens raw connections, and sees to their end."""
    opened: list[Connection] = []

    async def open_one(listener: Listener) -> Connection:
        opened.append(await Connection.open(listener))
        return opened[-1]

    yield open_one
    for connection in opened:
        connection.abort()
