"""Raw HTTP over real sockets, for what a well-behaved client never does."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from runner.gateway.listener import Listener

DEADLINE = 60.0
"""Seconds after which something that should have come has not. Far beyond what it takes, for busy machines."""


@dataclass
class Connection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @classmethod
    async def open(cls, listener: Listener) -> Connection:
        host, port = listener.address
        return cls(*await asyncio.wait_for(asyncio.open_connection(host, port), DEADLINE))

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def status(self) -> int:
        """The status of the next answer; its headers are read too."""
        head = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), DEADLINE)
        return int(head.split(b" ", 2)[1])

    async def until(self, text: bytes) -> bytes:
        return await asyncio.wait_for(self.reader.readuntil(text), DEADLINE)

    async def rest(self) -> bytes:
        """Everything up to the end of the connection."""
        return await asyncio.wait_for(self.reader.read(-1), DEADLINE)

    def abort(self) -> None:
        """Leaves without a word (RST)."""
        self.writer.transport.abort()

    async def close(self) -> None:
        self.writer.close()
        await self.writer.wait_closed()


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()


def chat(**fields: Any) -> bytes:
    body = json.dumps({"model": "chat", "messages": [{"role": "user", "content": "hi"}], **fields}).encode()
    head = f"Host: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return b"POST /v1/chat/completions HTTP/1.1\r\n" + head.encode() + body
