"""An answer that comes piece by piece: how it is announced, and what becomes of it when its request ends early."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Final

from falcon.asgi import Response

from runner.gateway.exchange import Exchange

EVENTS: Final = "text/event-stream; charset=utf-8"
LINES: Final = "application/x-ndjson"


def answer_with(
    stream: AsyncGenerator[bytes, None], response: Response, exchange: Exchange, *, kind: str, cut: bytes
) -> None:
    """Answer with `stream`, which is closed however the request ends. `kind` is EVENTS or LINES; `cut` is what is sent
    in place of the rest when the listener closes before the end."""
    exchange.defer(stream.aclose)
    exchange.cut_event = cut
    response.content_type = kind
    if kind == EVENTS:
        response.set_header("cache-control", "no-cache")
    response.set_header("x-accel-buffering", "no")  # nginx would hold pieces back
    response.stream = stream
