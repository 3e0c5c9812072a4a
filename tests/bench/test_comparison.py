"""What the comparison does with a peer that does not finish."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from runner.bench.figures import Level
from runner.bench.job import Target
from runner.bench.workers import Workers
from tests.bench.comparison import Comparison
from tests.bench.record import Budget
from tests.bench.server import Exchange, ScriptedServer, three_tokens

OPTIONS = {"turns": 2, "repeat": 3, "least": 1, "per_client": 1, "prompt_tokens": 8, "max_tokens": 3, "peer": "mlx_lm"}
PROBES = 8
"""Requests that find out how long prompts are: four of each of two lengths."""


@pytest.fixture
async def peer() -> AsyncIterator[ScriptedServer]:
    async with ScriptedServer() as started:
        yield started


async def compare(server: ScriptedServer, peer: ScriptedServer, clients: int, limit: float) -> tuple[Any, list[str]]:
    """The levels of both, and what was done about the peer."""
    replaced: list[str] = []
    us, them = (Target(host="127.0.0.1", port=one.port, model="m") for one in (server, peer))

    def measure() -> list[list[Level]]:
        options = argparse.Namespace(**OPTIONS, limit=limit)
        with Workers(1) as workers:
            comparison = Comparison(options, workers, Budget(None), us, them, lambda: replaced.append("replaced"))
            return comparison.both(clients, Budget(None))

    return await asyncio.to_thread(measure), replaced


async def test_a_peer_that_does_not_finish_comes_last_and_once_and_is_replaced(
    server: ScriptedServer, peer: ScriptedServer
) -> None:
    async def overwhelmed(exchange: Exchange) -> None:
        if exchange.number >= PROBES:
            assert len(server.requests) == PROBES + 4 * 3, "a warm-up and three levels of ours come before"
        if exchange.number >= PROBES + 2:
            await asyncio.Event().wait()
        await three_tokens(exchange)

    peer.behaviour = overwhelmed
    (ours, theirs), replaced = await compare(server, peer, 3, 1.0)
    assert [(level.requests, level.failed, level.unfinished) for level in ours] == [(3, 0, 0)] * 3
    assert len(theirs) == 1
    assert theirs[0].unfinished or "timeout" in theirs[0].failures
    assert replaced == ["replaced"]


async def test_a_peer_that_finishes_is_measured_as_often_but_for_its_warm_up(
    server: ScriptedServer, peer: ScriptedServer
) -> None:
    (ours, theirs), replaced = await compare(server, peer, 3, 20.0)
    assert [len(ours), len(theirs), replaced] == [3, 2, []]


async def test_few_clients_take_turns(server: ScriptedServer, peer: ScriptedServer) -> None:
    (ours, theirs), replaced = await compare(server, peer, 2, 20.0)
    assert [len(ours), len(theirs), replaced] == [3, 3, []]
