"""A server of completions that behaves as badly as a test wants: raw HTTP over real sockets, in the test's own loop."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from socket import SO_LINGER, SOL_SOCKET
from typing import Any

from runner.bench.job import Job, Load, Target

USAGE = {"prompt_tokens": 20, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 5}}


@dataclass
class Exchange:
    """One request, and the connection to answer it on."""

    number: int
    body: dict[str, Any]
    headers: dict[str, str]
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def head(self, status: int = 200, kind: str = "text/event-stream", *more: str, version: str = "1.1") -> None:
        lines = [f"HTTP/{version} {status} X", f"Content-Type: {kind}", *more, "", ""]
        self.writer.write("\r\n".join(lines).encode())

    def chunk(self, data: bytes) -> None:
        self.writer.write(b"%x\r\n%b\r\n" % (len(data), data))

    async def events(self, *events: object, done: bool = True) -> None:
        """A chunked stream, each event written and sent on its own."""
        self.head(200, "text/event-stream", "Transfer-Encoding: chunked")
        for event in events:
            self.chunk(sse(event))
            await self.writer.drain()
        if done:
            self.chunk(b"data: [DONE]\n\n")
            self.chunk(b"")

    def json(self, status: int, value: object, *more: str) -> None:
        data = json.dumps(value).encode()
        self.head(status, "application/json", f"Content-Length: {len(data)}", *more)
        self.writer.write(data)

    def reset(self) -> None:
        """Ends the connection with RST."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


def sse(event: object) -> bytes:
    return b"data: " + json.dumps(event).encode() + b"\n\n"


def text(content: str, reason: str | None = None) -> dict[str, Any]:
    """A chunk of a chat completion."""
    return {"object": "chat.completion.chunk", "choices": [{"delta": {"content": content}, "finish_reason": reason}]}


async def three_tokens(exchange: Exchange) -> None:
    """What a good server does."""
    usage = [{"choices": [], "usage": USAGE}] if exchange.body.get("stream_options") else []
    await exchange.events(text(""), text("a"), text("b"), text("c"), text("", "length"), *usage)


Behaviour = Callable[[Exchange], Awaitable[None]]


@dataclass
class ScriptedServer:
    """Answers every request by `behaviour`."""

    behaviour: Behaviour = three_tokens
    requests: list[Exchange] = field(default_factory=list)
    connections: int = 0
    running: int = 0
    most: int = 0

    async def __aenter__(self) -> ScriptedServer:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for exchange in self.requests:
            exchange.writer.transport.abort()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
                body = json.loads(await reader.readexactly(int(headers.get("content-length", "0"))) or b"{}")
                exchange = Exchange(len(self.requests), body, headers, reader, writer)
                self.requests.append(exchange)
                self.running += 1
                self.most = max(self.most, self.running)
                try:
                    await self.behaviour(exchange)
                finally:
                    self.running -= 1
                if writer.transport.is_closing():
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    def job(self, *, clients: int = 1, requests: int = 1, **load: Any) -> Job:
        """Requests to this server."""
        times = {"duration": load.pop("duration", None), "limit": load.pop("limit", None)}
        target = Target(host="127.0.0.1", port=self.port, model="m", usage=load.pop("usage", True))
        asked = Load(**{"words": 4, "max_tokens": 3, **load})
        return Job(target=target, load=asked, clients=clients, first=0, end=requests, **times)
