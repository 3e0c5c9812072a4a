"""One client's connection: requests out, one answer at a time in, parsed where the bytes arrive.

Between the request and the answer's end no task wakes: 512 streams cost one callback a read, and one wake-up a request.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from typing import Final, cast

from runner.bench.answer import Answer
from runner.bench.job import Target

_HEAD_BYTES: Final = 64 * 1024
_BODYLESS: Final = (204, 304)


class Closed(Exception):  # noqa: N818 - a condition, read as `except Closed`
    """The connection ended before the answer did. `begun` says whether any of the answer had arrived."""

    def __init__(self, kind: str, message: str, *, begun: bool) -> None:
        super().__init__(message)
        self.kind = kind
        self.begun = begun


class Connection(asyncio.Protocol):
    """Keeps alive as long as the server does; `usable` says whether another request may be sent."""

    def __init__(self) -> None:
        self.usable = False
        self._transport: asyncio.Transport | None = None
        self._answer: Answer | None = None
        self._ended: asyncio.Future[None] | None = None
        self._buffer = b""
        self._in_body = False
        self._begun = False
        self._chunked = False
        self._left = -1
        """Bytes still to come of the chunk, or of the body; -1 where a size line, or the connection's end, will say."""
        self._trailer = False

    @classmethod
    async def open(cls, target: Target) -> Connection:
        """Raises OSError when nobody listens there."""
        context = ssl.create_default_context() if target.tls else None
        loop = asyncio.get_running_loop()
        _, protocol = await loop.create_connection(cls, target.host, target.port, ssl=context)
        return protocol

    async def ask(self, request: bytes, answer: Answer) -> None:
        """Send one request and wait for the end of its answer. Raises Closed."""
        assert self._transport is not None, "opened"
        assert self._answer is None, "one request at a time"
        self._answer = answer
        self._in_body = self._begun = self._chunked = self._trailer = False
        self._left = -1
        self._buffer = b""
        self._ended = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            await self._ended
        finally:
            self._answer = self._ended = None

    def close(self) -> None:
        """Leave, at once."""
        self.usable = False
        if self._transport is not None:
            self._transport.abort()

    # ------------------------------------------------------------- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        self._transport = cast("asyncio.Transport", transport)
        self.usable = True

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio."""
        self.usable = False
        if self._ended is None or self._ended.done():
            return
        if self._in_body and not self._chunked and self._left < 0 and exc is None:
            self._finish()  # a body without a length ends with its connection
        else:
            kind = "closed" if exc is None else "reset"
            message = "the server closed the connection" if exc is None else str(exc) or type(exc).__name__
            self._ended.set_exception(Closed(kind, message, begun=self._begun))

    def data_received(self, data: bytes) -> None:
        """Called by asyncio with whatever arrived."""
        if self._answer is None or self._ended is None or self._ended.done():
            self.close()  # nobody asked
            return
        now = time.perf_counter()
        self._begun = True
        try:
            if not self._in_body:
                data = self._head(data)
                if not self._in_body:
                    return
            if not self._chunked:
                self._plain(data, now)
            elif not self._one_chunk(data, now):
                self._chunks(data, now)
        except ValueError as error:
            self._ended.set_exception(Closed("bad_http", str(error), begun=True))
            self.close()

    def _head(self, data: bytes) -> bytes:
        """Reads the head once it is complete. Returns what follows it."""
        data = self._buffer + data
        head, end, rest = data.partition(b"\r\n\r\n")
        if not end:
            if len(data) > _HEAD_BYTES:
                raise ValueError("the head of the answer does not end")
            self._buffer = data
            return b""
        self._buffer = b""
        line, *fields = head.decode("latin-1").split("\r\n")
        version, code, *_ = [*line.split(" ", 2), ""]
        if not version.startswith("HTTP/1.") or not code.isdigit():
            raise ValueError(f"not an HTTP answer: {line[:80]!r}")
        status = int(code)
        if status < 200:
            return self._head(rest)
        headers = {name.strip().lower(): value.strip() for name, _, value in (field.partition(":") for field in fields)}
        alive = headers.get("connection", "").lower()
        self.usable = alive == "keep-alive" if version == "HTTP/1.0" else alive != "close"
        self._chunked = "chunked" in headers.get("transfer-encoding", "").lower()
        length = headers.get("content-length", "")
        self._left = int(length) if length.isdigit() and not self._chunked else -1
        if status in _BODYLESS:
            self._left = 0
        self._in_body = True
        assert self._answer is not None, "there is one while data is taken"
        self._answer.head(status, headers.get("content-type", "").lower())
        return rest

    def _plain(self, data: bytes, now: float) -> None:
        """A body with a length, or up to the end of the connection."""
        assert self._answer is not None, "there is one while data is taken"
        if data:
            self._answer.feed(data if self._left < 0 else data[: self._left], now)
        if self._left >= 0:
            self._left -= len(data)
            if self._left <= 0:
                self._finish()

    def _one_chunk(self, data: bytes, now: float) -> bool:
        """What a read brings of a stream, nearly always: one chunk, whole. False for anything else."""
        if self._left >= 0 or self._buffer or self._trailer:
            return False
        end = data.find(b"\r\n")
        size, length = data[:end], len(data) - end - 4
        if length <= 0 or not size.isalnum() or int(size, 16) != length:
            return False
        assert self._answer is not None, "there is one while data is taken"
        self._answer.feed(data[end + 2 : -2], now)
        return True

    def _chunks(self, data: bytes, now: float) -> None:
        """A chunked body: size line, data, line end; the last has size 0 and may have trailers."""
        assert self._answer is not None, "there is one while data is taken"
        if self._buffer:
            data, self._buffer = self._buffer + data, b""
        at = 0
        while at < len(data):
            if self._left < 0:
                end = data.find(b"\r\n", at)
                if end < 0:
                    break
                line = data[at:end]
                at = end + 2
                if self._trailer:
                    if not line:
                        self._finish()
                        return
                    continue
                self._left = int(line.partition(b";")[0], 16)
                if self._left == 0:
                    self._trailer, self._left = True, -1
                continue
            if len(data) - at < self._left + 2:
                break
            self._answer.feed(data[at : at + self._left], now)
            at += self._left + 2
            self._left = -1
        self._buffer = data[at:]

    def _finish(self) -> None:
        assert self._ended is not None, "there is one while data is taken"
        if not self._ended.done():
            self._ended.set_result(None)
        if not self.usable and self._transport is not None:
            self._transport.close()
