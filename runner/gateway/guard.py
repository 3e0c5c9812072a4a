"""The outermost ASGI layer of a listener: who may ask, how much they may send, and what happens when they leave.

It answers `/health` itself: the listener's loop runs, and that is all there is to say.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Final

from runner.gateway.call import JSON, Answer, Application, Call, Receive, Scope, Send, refusal_answer
from runner.gateway.errors import error_body, error_kind
from runner.gateway.exchange import SCOPE_KEY, Exchange, new_id
from runner.gateway.policy import Policy
from runner.telemetry import GatewayMetrics

logger = logging.getLogger(__name__)

HEALTH: Final = "/health"

CLIENT_LEFT: Final = 499
"""What metrics and the log call the status of an answer whose client left (nginx's number)."""

_MAX_REQUEST_ID: Final = 128


class Guard:
    """Wraps an ASGI application. `policy` and `application` may be replaced, for the requests that follow."""

    def __init__(self, listener: str, policy: Policy, application: Application, metrics: GatewayMetrics) -> None:
        self.policy = policy
        self.application = application
        self._listener = (listener,)
        self._metrics = metrics
        self._calls: set[Call] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def in_flight(self) -> int:
        """Requests being worked on."""
        return len(self._calls)

    async def wait_idle(self) -> None:
        """Returns when no request is being worked on."""
        await self._idle.wait()

    def cut(self) -> int:
        """Ends every running request: 503 where no answer has begun, an error event in a stream of events.

        Returns how many there were.
        """
        calls = list(self._calls)
        for call in calls:
            call.cut()
        return len(calls)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.application(scope, receive, send)
            return
        # ASGI promises no more than an iterable of iterables.
        scope["headers"] = [(name, value) for name, value in scope["headers"]]
        if scope["http_version"] == "1":  # Granian's name for 1.0, which proxies such as nginx speak and Falcon refuses
            scope["http_version"] = "1.0"
        headers: dict[bytes, bytes] = dict(scope["headers"])
        exchange = scope[SCOPE_KEY] = Exchange(_request_id(headers), scope["path"])
        policy = self.policy
        call = Call(exchange, policy, headers, receive, send)
        self._begin(call)
        try:
            answer = self._own_answer(scope, headers, policy)
            if answer is None:
                if scope["method"] == "HEAD":
                    scope["method"] = "GET"  # as GET; the server leaves out the body
                await call.run(self.application(scope, call.receive, call.send))
            elif answer[0] == 413 and b"expect" not in headers:
                await call.run(call.refuse_body(answer))
            else:
                await call.run(call.answer(answer))
        finally:
            self._end(call)

    @staticmethod
    def _own_answer(scope: Scope, headers: dict[bytes, bytes], policy: Policy) -> Answer | None:
        """What is answered without the application; None to let the request through."""
        size = sum([len(name) + len(value) for name, value in scope["headers"]])
        refusal = policy.refuse_sender(headers, size)
        if refusal is None:
            preflight = policy.preflight_headers(scope["method"], headers)
            if preflight is not None:
                return 204, preflight, b""
            refusal = policy.refuse_request(scope["path"], headers)
        if refusal is not None:
            return refusal_answer(refusal)
        if scope["path"] != HEALTH:
            return None
        scope[SCOPE_KEY].route = HEALTH
        return _health(scope["method"])

    def _begin(self, call: Call) -> None:
        self._calls.add(call)
        self._idle.clear()
        self._metrics.in_flight.add(self._listener)

    def _end(self, call: Call) -> None:
        self._calls.discard(call)
        if not self._calls:
            self._idle.set()
        exchange, metrics = call.exchange, self._metrics
        if call.left:
            exchange.status = CLIENT_LEFT
        seconds = time.perf_counter() - exchange.started
        metrics.in_flight.add(self._listener, -1)
        metrics.requests.add((*self._listener, exchange.route, exchange.model, str(exchange.status)))
        metrics.request_seconds.series((exchange.route,)).observe(seconds)
        level = logging.INFO if exchange.model else logging.DEBUG
        if logger.isEnabledFor(level):
            fields = {"listener": self._listener[0], "request_id": exchange.request_id, "route": exchange.route}
            fields |= {"model": exchange.model, "adapter": exchange.adapter, "status": str(exchange.status)}
            logger.log(level, "request", extra={**fields, "tokens": exchange.tokens, "seconds": round(seconds, 4)})


def _request_id(headers: dict[bytes, bytes]) -> str:
    """The client's own `X-Request-Id` when it is plain text of a sane length, else a new one."""
    given = headers.get(b"x-request-id", b"")
    if 0 < len(given) <= _MAX_REQUEST_ID and given.isascii():
        text = given.decode("ascii")
        if text.isprintable():
            return text
    return new_id("req_")


def _health(method: str) -> Answer:
    if method == "GET":
        return 200, [JSON], b'{"status":"ok"}'
    if method == "HEAD":
        return 200, [JSON], b""
    body = error_body(f"{method} is not allowed on {HEALTH}; use GET", error_kind(405))
    return 405, [JSON, (b"allow", b"GET, HEAD")], body
