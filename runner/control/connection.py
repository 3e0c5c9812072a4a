"""One connection to one engine: frames out, frames in, each delta handed to the request it belongs to."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import cast

import msgspec

from runner.errors import EngineFailed, InvalidRequest, NotServed, RequestError, Unavailable
from runner.protocol import (
    Cancel,
    Delta,
    FromEngine,
    Generate,
    Rejected,
    Step,
    ToEngine,
    decoder_from_engine,
    encode_frame,
)

logger = logging.getLogger(__name__)

_OPEN_FIELDS = ("tools", "chat_template_kwargs")
"""Fields of a request in which clients send JSON of their own."""

_REJECTIONS: dict[int, type[RequestError]] = {400: InvalidRequest, 404: NotServed, 503: Unavailable}


def _can_be_sent(value: object) -> bool:
    try:
        msgspec.msgpack.encode(value)
    except (OverflowError, RecursionError):
        return False
    return True


class _Row:
    """What has arrived for one request and was not taken yet."""

    __slots__ = ("error", "items", "waiter")

    def __init__(self) -> None:
        self.items: list[Delta] = []
        self.error: RequestError | None = None
        self.waiter: asyncio.Future[None] | None = None

    def wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)


class EngineConnection(asyncio.Protocol):
    """The runner's end of an engine's socket.

    `on_message` gets every frame that is not about a request; `on_lost` is called once, when the socket closes.
    """

    def __init__(self, on_message: Callable[[FromEngine], None], on_lost: Callable[[], None]) -> None:
        self._on_message = on_message
        self._on_lost = on_lost
        self._decoder = decoder_from_engine()
        self._transport: asyncio.Transport | None = None
        self._rows: dict[int, _Row] = {}
        self._ids = itertools.count(1)
        self._idle = asyncio.Event()
        self._idle.set()

    @classmethod
    async def open(
        cls, path: Path, on_message: Callable[[FromEngine], None], on_lost: Callable[[], None]
    ) -> EngineConnection:
        """Connect to an engine's socket. Raises OSError when nobody listens there."""
        loop = asyncio.get_running_loop()
        _, protocol = await loop.create_unix_connection(lambda: cls(on_message, on_lost), str(path))
        return protocol

    @property
    def in_flight(self) -> int:
        """Requests that have not ended."""
        return len(self._rows)

    @property
    def lost(self) -> bool:
        """Whether the socket is closed."""
        return self._transport is None or self._transport.is_closing()

    async def wait_idle(self) -> None:
        """Return once no request is in flight."""
        await self._idle.wait()

    def cut(self, reason: str) -> None:
        """End every request in flight, to be sent again by whoever wants to."""
        for row in self._rows.values():
            row.error = Unavailable(reason, code="drain_deadline")
            row.wake()

    def _ask(self, request: Generate) -> None:
        """Send a request. Raises InvalidRequest where it has what no frame can carry."""
        try:
            self.send(request)
        except (OverflowError, RecursionError):  # JSON has integers of any size, frames have 64 bits
            field = next((name for name in _OPEN_FIELDS if not _can_be_sent(getattr(request, name))), None)
            raise InvalidRequest(
                f"{f'`{field}`' if field else 'the request'} is nested too deeply or has an integer over 64 bits",
                param=field,
                code="invalid_value",
            ) from None

    def send(self, message: ToEngine) -> None:
        """Write one frame; after the connection is lost it goes nowhere, and the requests have failed already."""
        if self._transport is not None:
            self._transport.write(encode_frame(message))

    def close(self) -> None:
        """Close the socket."""
        if self._transport is not None:
            self._transport.close()

    async def generate(self, request: Generate) -> AsyncGenerator[list[Delta], None]:
        """See `runner.gateway.backend.Deployment.generate`. Leaving early cancels the row in the engine."""
        if self.lost:
            raise EngineFailed("the engine is gone", code="engine_died")
        row_id = next(self._ids)
        row = self._rows[row_id] = _Row()
        self._idle.clear()
        loop = asyncio.get_running_loop()
        ended = False
        try:
            self._ask(msgspec.structs.replace(request, id=row_id))
            while not ended:
                if not row.items:  # a coroutine of its own for this would cost each token one
                    if row.error is None:
                        row.waiter = loop.create_future()
                        await row.waiter
                    if row.error is not None and not row.items:
                        ended = True
                        raise row.error
                deltas, row.items = row.items, []
                ended = deltas[-1].finish_reason is not None
                if deltas[-1].finish_reason == "error":
                    raise EngineFailed(deltas[-1].error or "the engine failed on this request", code="engine_error")
                yield deltas
        finally:
            del self._rows[row_id]
            if not ended:
                self.send(Cancel(row_id))
            if not self._rows:
                self._idle.set()

    # ------------------------------------------------------------- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Called by asyncio with whatever arrived."""
        try:
            messages = self._decoder.feed(data)
        except (ValueError, msgspec.DecodeError):
            logger.exception("engine sent what does not decode")
            self.close()
            return
        for message in messages:
            if isinstance(message, Step):
                self._deliver(message)
            elif isinstance(message, Rejected):
                self._reject(message)
            else:
                self._on_message(message)

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio: every request in flight has failed, at once."""
        self._transport = None
        for row in self._rows.values():
            row.error = EngineFailed("the engine died while it worked on this request", code="engine_died")
            row.wake()
        self._on_lost()

    def _deliver(self, step: Step) -> None:
        find = self._rows.get
        for delta in step.deltas:
            row = find(delta.id)
            if row is not None:
                row.items.append(delta)
                if (waiter := row.waiter) is not None and not waiter.done():
                    waiter.set_result(None)

    def _reject(self, message: Rejected) -> None:
        row = self._rows.get(message.id)
        if row is not None:
            error = _REJECTIONS.get(message.status, EngineFailed)
            row.error = error(message.reason, param=message.param, code=message.code)
            row.wake()
