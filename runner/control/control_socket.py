"""The control socket: one JSON request a connection, answered with JSON lines; the last has `done` or `error`.

Only the owner can connect (mode 0600).
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from runner.errors import ManifestError, MlxRunError

logger = logging.getLogger(__name__)

Reply = dict[str, Any]
Handler = Callable[[dict[str, Any]], AsyncIterator[Reply]]

_MAX_REQUEST = 1024 * 1024
"""Bytes in a request line."""


class ControlSocket:
    """Answers requests `{"op": NAME, ...}` with the handler of that name.

    `feeds` names the handlers that answer for as long as somebody listens: they end when the client hangs up, and not
    at the next line that cannot be written. The others finish what they were asked for.
    """

    def __init__(self, path: Path, handlers: dict[str, Handler], feeds: frozenset[str] = frozenset()) -> None:
        self._path = path
        self._handlers = handlers
        self._feeds = feeds
        self._server: asyncio.Server | None = None
        self._answering: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen. The runner's lock is held, so a socket file that is there is a dead one's."""
        self._path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._serve, str(self._path), limit=_MAX_REQUEST)
        self._path.chmod(0o600)

    async def close(self) -> None:
        """Stop listening, once those who asked have their answer (or after a second)."""
        if self._server is not None:
            self._server.close()
        if self._answering:
            await asyncio.wait(self._answering, timeout=1.0)
        self._path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None, "asyncio serves a connection in a task"
        self._answering.add(task)
        try:
            await self._answer(reader, writer.write, writer.drain)
        except (ConnectionError, asyncio.CancelledError):
            pass  # the client went away, or the runner stops
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()
            self._answering.discard(task)

    async def _answer(
        self, reader: asyncio.StreamReader, write: Callable[[bytes], None], drain: Callable[[], Awaitable[None]]
    ) -> None:
        try:
            request = json.loads(await reader.readline())
            handler = self._handlers[request["op"]]
        except (ValueError, KeyError, TypeError, RecursionError):
            known = ", ".join(self._handlers)
            write(_line({"error": {"message": f"not a control request; `op` is one of {known}"}}))
            return
        with _while_heard(reader) if request["op"] in self._feeds else nullcontext():
            try:
                async for reply in handler(request):
                    write(_line(reply))
                    await drain()
            except MlxRunError as error:
                write(_line({"error": error_json(error)}))
            except Exception as error:
                logger.exception("control request failed")
                write(_line({"error": {"message": f"the request {request['op']!r} failed: {error!r}"}}))
            await drain()


@contextmanager
def _while_heard(reader: asyncio.StreamReader) -> Iterator[None]:
    """Cancels the task within once its client is gone; what a client still says is nothing to us."""
    answering = asyncio.current_task()
    assert answering is not None, "an answer is a task of its own"

    async def listen() -> None:
        with suppress(ConnectionError):
            while await reader.read(4096):
                pass
        answering.cancel()

    listening = asyncio.create_task(listen())
    try:
        yield
    finally:
        listening.cancel()


def error_json(error: MlxRunError) -> dict[str, Any]:
    """An error of the tree as the control socket's clients get it."""
    data: dict[str, Any] = {"type": type(error).__name__, "message": error.message, "hint": error.hint}
    if isinstance(error, ManifestError):
        data["diagnostics"] = [
            {k: getattr(d, k) for k in ("file", "line", "column", "path", "message", "hint", "excerpt", "code")}
            for d in error.diagnostics
        ]
    return data


def _line(reply: Reply) -> bytes:
    return json.dumps(reply, default=str).encode() + b"\n"
