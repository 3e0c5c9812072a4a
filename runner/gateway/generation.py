"""From one API request to its generations, whatever the API: started, timed, merged, and closed together.

A request asks for one completion or several; each is a `Generate` of its own, on the same route. Nothing is answered
before the first delta is there, so that a refusal still has its HTTP status.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from runner.errors import EngineFailed
from runner.gateway.backend import Route
from runner.gateway.exchange import Exchange
from runner.protocol import Delta, Generate
from runner.telemetry import GatewayMetrics, TokenTimer

Batch = tuple[int, list[Delta]]
"""The index of a completion, and what it has new: never empty, and its last delta may be the completion's last."""


@dataclass(frozen=True, slots=True)
class Generation:
    """A request under way: `first` is there already, `rest` follows until each completion has its `finish_reason`.

    The guard closes `rest` with the exchange. Iterating it raises what `Deployment.generate` raises; a row that ends in
    an error, or an engine that ends without a finish reason, is EngineFailed.
    """

    first: Batch
    rest: AsyncGenerator[Batch, None]
    count: int


async def start(route: Route, requests: Sequence[Generate], exchange: Exchange, metrics: GatewayMetrics) -> Generation:
    """Starts `requests` and waits for the first delta of any. Raises what `Deployment.generate` raises."""
    exchange.model = route.model
    exchange.adapter = route.adapter or ""
    streams = [
        _completion(index, route.deployment.generate(request), exchange, metrics)
        for index, request in enumerate(requests)
    ]
    rest = streams[0] if len(streams) == 1 else _interleaved(streams)
    exchange.defer(rest.aclose)
    return Generation(await anext(rest), rest, len(streams))


async def _completion(
    index: int, deltas: AsyncGenerator[list[Delta], None], exchange: Exchange, metrics: GatewayMetrics
) -> AsyncGenerator[Batch, None]:
    """One completion up to its end, timed."""
    timer = TokenTimer(metrics, exchange.model, exchange.started)
    try:
        async with aclosing(deltas):
            async for batch in deltas:
                timer.tick(batch[0].tokens if len(batch) == 1 else sum([delta.tokens for delta in batch]))
                last = batch[-1]
                if last.finish_reason is None:
                    yield index, batch
                    continue
                if last.finish_reason == "error":
                    raise EngineFailed(last.error or "the engine could not finish this request", code="engine_failed")
                if last.finish_reason == "cancelled":
                    raise EngineFailed("the engine cancelled this request", code="engine_cancelled")
                if last.usage is not None:
                    metrics.prompt_tokens.add((exchange.model,), last.usage.prompt_tokens)
                    metrics.cached_tokens.add((exchange.model,), last.usage.cached_tokens)
                yield index, batch
                return
        raise EngineFailed("the engine ended the answer before it was complete", code="engine_failed")
    finally:
        exchange.tokens += timer.stop()


async def _interleaved(streams: list[AsyncGenerator[Batch, None]]) -> AsyncGenerator[Batch, None]:
    """All completions as they come: one task each; the first error ends them all.

    The queue has no bound of its own: it holds at most what the engine has generated for this request.
    """
    queue: asyncio.Queue[Batch | Exception | None] = asyncio.Queue()

    async def pump(stream: AsyncGenerator[Batch, None]) -> None:
        try:
            async with aclosing(stream):
                async for batch in stream:
                    queue.put_nowait(batch)
        except Exception as error:  # noqa: BLE001 - handed to the reader, who raises it
            queue.put_nowait(error)
        else:
            queue.put_nowait(None)

    tasks = [asyncio.create_task(pump(stream)) for stream in streams]
    running = len(tasks)
    try:
        while running:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
