"""Streams that begin while their model is still loading: a comment now and then keeps the connection open.

Nothing is answered before it is known how, so that a refusal still has its HTTP status: but a client, or a proxy
between, may not wait for as long as a large model takes to load. So a stream that has waited for a while for a model
that is not loaded begins with comments, which clients of server-sent events pass over, and says in an event what went
wrong.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Final

from runner.gateway.backend import Route
from runner.gateway.errors import report
from runner.gateway.exchange import Exchange
from runner.gateway.generation import Generation, start
from runner.protocol import Generate
from runner.telemetry import GatewayMetrics

BEFORE: Final = 2.0
"""Seconds that a stream waits for its model without a word."""

EVERY: Final = 5.0
"""Seconds between two comments."""

COMMENT: Final = b": loading\n\n"

Stream = AsyncGenerator[bytes, None]


async def begin(
    route: Route,
    requests: Sequence[Generate],
    exchange: Exchange,
    metrics: GatewayMetrics,
    stream: Callable[[Generation], Stream],
    failed: Callable[[Exception], bytes],
) -> Stream:
    """What a streamed answer consists of: `stream` of the generation, with comments before it where its model has to be
    loaded first. `failed` writes an error as an event.

    Raises what `generation.start` raises, as long as no comment was sent.
    """
    if route.deployment.loaded:
        return stream(await start(route, requests, exchange, metrics))
    starting = asyncio.ensure_future(start(route, requests, exchange, metrics))

    async def give_up() -> None:
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await starting

    try:
        await asyncio.wait([starting], timeout=BEFORE)
    except asyncio.CancelledError:
        await give_up()
        raise
    if starting.done():
        return stream(starting.result())
    exchange.defer(give_up)  # after what the start itself has deferred, and so before it when all is closed
    return _commented(starting, exchange, stream, failed)


async def _commented(
    starting: asyncio.Future[Generation],
    exchange: Exchange,
    stream: Callable[[Generation], Stream],
    failed: Callable[[Exception], bytes],
) -> Stream:
    while not starting.done():
        yield COMMENT
        await asyncio.wait([starting], timeout=EVERY)
    try:
        generation = starting.result()
    except Exception as error:  # noqa: BLE001 - the status is gone: an event says it
        report(error, {"request_id": exchange.request_id, "route": exchange.route})
        yield failed(error)
        return
    async with contextlib.aclosing(stream(generation)) as rest:
        async for data in rest:
            yield data
