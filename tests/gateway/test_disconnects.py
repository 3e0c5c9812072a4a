"""Clients that leave: every generator that was opened is closed, and nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
import random
import tracemalloc
from collections.abc import AsyncGenerator

from runner.gateway.backend import Route
from runner.gateway.listener import Listener
from runner.protocol import Delta, Generate
from runner.telemetry import GatewayMetrics
from tests.gateway.conftest import Connect, spec_of
from tests.gateway.fakes import FakeDeployment, FakeDirectory
from tests.gateway.wire import Connection, chat

CLIENTS = 200


class Ticking(FakeDeployment):
    """Generates until it is closed: only a client's leaving ends it."""

    async def generate(self, request: Generate) -> AsyncGenerator[list[Delta], None]:
        self.opened += 1
        try:
            while True:
                await asyncio.sleep(0.001)
                yield [Delta(0, "tick ", 1)]
        finally:
            self.closed += 1
            self.changed.set()


async def leave_somewhere(listener: Listener, rng: random.Random) -> None:
    """Sends all or part of a request, waits for some of the answer or for a moment, and leaves."""
    stream = rng.random() < 0.7
    request = chat(stream=stream, n=rng.choice([1, 1, 3]))
    connection = await Connection.open(listener)
    whole = rng.random() >= 0.15
    await connection.send(request if whole else request[: rng.randrange(1, len(request))])
    if stream and whole and rng.random() < 0.8:
        await asyncio.wait_for(connection.reader.readexactly(rng.randrange(1, 4000)), 60)
    else:
        await asyncio.sleep(rng.random() / 100)
    if rng.random() < 0.5:
        connection.abort()
    else:
        connection.writer.close()


async def test_200_clients_that_leave_at_random_points(directory: FakeDirectory, metrics: GatewayMetrics) -> None:
    rng = random.Random(7)
    directory.deployment = deployment = Ticking()
    listener = Listener(spec_of(), directory, metrics)
    await listener.start()
    tasks_before = len(asyncio.all_tasks())
    for _ in range(CLIENTS // 20):
        await asyncio.gather(*[leave_somewhere(listener, rng) for _ in range(20)])
    await deployment.until("opened == closed")
    async with asyncio.timeout(60):
        await listener._guard.wait_idle()
    assert deployment.opened >= CLIENTS / 4, "those that waited for some of the answer, and whoever else was heard"
    async with asyncio.timeout(60):
        while len(asyncio.all_tasks()) > tasks_before:
            await asyncio.sleep(0.001)
    assert metrics.in_flight.values == {("lm",): 0}
    assert await listener.close(1) == 0


async def test_a_row_is_freed_before_its_next_token(
    directory: FakeDirectory, listener: Listener, connect: Connect
) -> None:
    """The generator waits for a token that never comes: only the disconnect can end it."""
    deployment = directory.deployment
    for stream in (True, False):
        deployment.scripts = [[[Delta(0, "Hel", 1)], asyncio.Event()]]
        connection = await connect(listener)
        await connection.send(chat(stream=stream))
        await deployment.until("opened > closed")
        if stream:
            await connection.until(b"Hel")
        connection.abort()
        await deployment.until("opened == closed")


async def test_a_client_that_does_not_read_and_leaves(
    directory: FakeDirectory, listener: Listener, connect: Connect
) -> None:
    deployment = directory.deployment
    deployment.scripts = [[*([Delta(0, "x" * 1000, 1)] for _ in range(2000)), asyncio.Event()]]
    connection = await connect(listener)
    await connection.send(chat(stream=True))
    await deployment.until("opened == 1")
    connection.abort()
    await deployment.until("opened == closed")


class Forgetful(FakeDirectory):
    """Keeps no record of what it was asked."""

    def resolve(self, listener: str, model: str | None, adapter_name: str | None) -> Route:
        route = super().resolve(listener, model, adapter_name)
        self.lookups.clear()
        return route


async def test_memory_is_flat(metrics: GatewayMetrics) -> None:
    deployment = Ticking()
    listener = Listener(spec_of(), Forgetful(deployment), metrics)
    await listener.start()
    rng = random.Random(3)
    sizes = []
    tracemalloc.start()
    try:
        for _ in range(4):
            for _ in range(4):
                await asyncio.gather(*[leave_somewhere(listener, rng) for _ in range(15)])
            await deployment.until("opened == closed")
            async with asyncio.timeout(60):
                await listener._guard.wait_idle()
            gc.collect()
            sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    await listener.close(1)
    per_client = (sizes[-1] - sizes[1]) / 120
    assert per_client < 500, f"a request's own objects take thousands of bytes: {sizes}"
