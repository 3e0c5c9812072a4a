"""One request on its way through the guard.

Falcon does not notice a client that leaves while `resp.stream` runs. So one task here owns `receive()`: once the
request's body is complete, it waits for `http.disconnect` and then cancels the request's task, whatever that is doing.
What the request had opened (`Exchange.defer`) is closed in the same breath, which frees its row in the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any, Final

from runner.errors import InvalidRequest, RequestError, TooLarge
from runner.gateway.dialects import in_dialect
from runner.gateway.errors import describe, error_body, error_kind
from runner.gateway.exchange import CUT_MESSAGE, Exchange
from runner.gateway.policy import Policy, Refusal

Scope = dict[str, Any]
Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]
Answer = tuple[int, list[tuple[bytes, bytes]], bytes]
"""Status, headers and body."""

BODY_TIMEOUT: Final = 60.0
"""Seconds between two pieces of a request's body."""

DRAIN_BYTES: Final = 64 * 1024 * 1024
DRAIN_SECONDS: Final = 5.0
"""How much of a body over the limit is read and dropped, and for how long."""

JSON: Final = (b"content-type", b"application/json")

_CUT: Final = Refusal(503, "shutting_down", CUT_MESSAGE)


class Call:
    """One request on its way through: the application runs in this task, and a second one waits for the disconnect."""

    __slots__ = (
        "_begun",
        "_body_bytes",
        "_body_length",
        "_cut",
        "_ended",
        "_headers",
        "_policy",
        "_receive",
        "_send",
        "_task",
        "_watcher",
        "exchange",
        "left",
    )

    def __init__(
        self,
        exchange: Exchange,
        policy: Policy,
        headers: dict[bytes, bytes],
        receive: Receive,
        send: Send,
    ) -> None:
        self.exchange = exchange
        self.left = False
        self._policy = policy
        self._receive = receive
        self._send = send
        self._headers = [(b"x-request-id", exchange.request_id.encode()), *policy.cors_headers(headers)]
        task = asyncio.current_task()
        assert task is not None, "a call is made in its request's task"
        self._task = task
        self._watcher: asyncio.Task[None] | None = None
        length = headers.get(b"content-length", b"")
        self._body_length = int(length) if length.isdigit() else None
        self._body_bytes = 0
        self._begun = False
        self._ended = False
        self._cut = False

    async def run(self, work: Awaitable[None]) -> None:
        """Awaits the request's work, in this task: to its end, its client's, or the listener's."""
        try:
            await work
        except asyncio.CancelledError:
            if not (self.left or self._cut):
                raise
            self._task.uncancel()
        except RequestError as error:  # Falcon's handlers do not cover the first piece of the body
            if self._begun:
                raise
            status, headers, body = describe(error)
            named = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
            await self.answer((status, [JSON, *named], body))
        finally:
            self._ended = True
            if self._watcher is not None:
                self._watcher.cancel()
            await self.exchange.close()
        if self._cut:
            await self._explain_cut()

    async def answer(self, answer: Answer) -> None:
        """A whole answer, without the application."""
        status, headers, body = answer
        if status >= 400 and body:
            body = in_dialect(self.exchange.path, body, status)
        if body:
            headers = [*headers, (b"content-length", str(len(body)).encode())]
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})

    async def refuse_body(self, answer: Answer) -> None:
        """The answer to a body that announced more than it may have."""
        await self._drain()
        await self.answer(answer)

    def cut(self) -> None:
        """Ends the request because the listener closes."""
        if not self._ended:
            self._cut = True
            self._task.cancel()

    async def _explain_cut(self) -> None:
        """Says why where that is possible; any other answer stays incomplete, which the client's HTTP layer sees."""
        if not self._begun:
            await self.answer(refusal_answer(_CUT))
        elif self.exchange.cut_event:
            await self.send({"type": "http.response.body", "body": self.exchange.cut_event})

    async def receive(self) -> Message:
        """The application's `receive`: counts the body, and hands over to the watcher when it is complete."""
        if self._watcher is not None:
            await asyncio.shield(self._watcher)
            return {"type": "http.disconnect"}
        try:
            async with asyncio.timeout(BODY_TIMEOUT):
                message = await self._receive()
        except TimeoutError:
            raise InvalidRequest("the body did not arrive in time", code="body_timeout") from None
        if message["type"] == "http.disconnect":
            # Before the body was complete: what came of it may look whole, and nobody waits for an answer.
            self._leave()
            await asyncio.sleep(0)  # the cancellation arrives here
        elif message["type"] == "http.request":
            self._body_bytes += len(message.get("body", b""))
            if self._body_bytes > self._policy.max_body_bytes:
                if message.get("more_body"):
                    await self._drain()
                raise TooLarge(self._policy.body_limit_message, code="body_too_large")
            if self._body_bytes == self._body_length:
                message["more_body"] = False  # Granian says so in one more piece, which few handlers wait for
            if not message.get("more_body"):
                self._watcher = asyncio.get_running_loop().create_task(self._watch())
        return message

    async def _drain(self) -> None:
        """Reads what a client still sends and drops it: most clients look for an answer only when they have sent all,
        and would see a broken connection instead of a 413. Bounded, as nginx's lingering close is."""
        left = DRAIN_BYTES
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                while left > 0:
                    message = await self._receive()
                    left -= len(message.get("body", b""))
                    if message["type"] == "http.disconnect" or not message.get("more_body"):
                        return

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._leave()

    def _leave(self) -> None:
        """The client is gone: nothing more is done for it."""
        if not self._ended:
            self.left = True
            self._task.cancel()

    def send(self, message: Message) -> Awaitable[None]:
        """The application's `send`; not a coroutine itself, since every chunk of every stream comes through here."""
        if message["type"] == "http.response.start":
            self._begun = True
            self.exchange.status = message["status"]
            message["headers"] = [*message["headers"], *self._headers]
        elif not message.get("more_body"):
            self._ended = True
        return self._send(message)


def refusal_answer(refusal: Refusal) -> Answer:
    """A refusal in OpenAI's shape."""
    headers = [JSON]
    if refusal.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    elif refusal.status == 503:
        headers.append((b"retry-after", b"1"))
    elif refusal.status == 413:
        headers.append((b"connection", b"close"))
    return refusal.status, headers, error_body(refusal.message, error_kind(refusal.status), code=refusal.code)
