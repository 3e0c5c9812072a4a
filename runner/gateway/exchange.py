"""What is known of one request while it runs: shared by the guard, which makes it, and the handlers."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from falcon.asgi import Request

logger = logging.getLogger(__name__)

SCOPE_KEY: Final = "mlx_run.exchange"

CUT_MESSAGE: Final = "this listener is closing; try again"


class Exchange:
    """One request and its answer. `started` is on time.perf_counter's clock.

    Handlers say what they learn (`route`, `model`, …) and what has to be undone however the request ends (`defer`).
    `cut_event` is what a stream of events ends with when the listener closes before it is complete.
    """

    __slots__ = (
        "_closers",
        "adapter",
        "cut_event",
        "model",
        "path",
        "request_id",
        "route",
        "started",
        "status",
        "tokens",
    )

    def __init__(self, request_id: str, path: str = "") -> None:
        self.request_id = request_id
        self.path = path
        self.started = time.perf_counter()
        self.route = "other"
        self.model = ""
        self.adapter = ""
        self.status = 0
        self.tokens = 0
        self.cut_event = b""
        self._closers: list[Callable[[], Awaitable[Any]]] = []

    def defer(self, close: Callable[[], Awaitable[Any]]) -> None:
        """Has the guard await `close()` when the request ends: answered, failed, or left by its client."""
        self._closers.append(close)

    async def close(self) -> None:
        """Runs what was deferred, the last first, and all of it."""
        while self._closers:
            try:
                await self._closers.pop()()
            except Exception:
                logger.exception("closing a request failed", extra={"request_id": self.request_id})


def exchange_of(request: Request) -> Exchange:
    """The exchange of a request that came through the guard."""
    exchange = request.scope[SCOPE_KEY]
    assert isinstance(exchange, Exchange), "requests come through the guard"
    return exchange


def new_id(prefix: str) -> str:
    """`prefix` and 24 random hexadecimal digits."""
    return prefix + os.urandom(12).hex()
