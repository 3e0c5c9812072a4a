"""A runner that is told to stop while something is still being drained from an edit before."""

from __future__ import annotations

import asyncio
import signal

import httpx
import pytest

from runner.control import client
from tests.control.asking import ask, in_flight
from tests.control.scene import Scene, free_port

LONG = 1_000_000
"""Tokens: far more than come while a test runs."""

TWO = "chat: {source: ./models/chat}\nother: {source: ./models/other}"


REPLACED = TWO.replace("models/chat", "models/other")
REMOVED = TWO.split("\n")[1]


async def edited_at_work(scene: Scene, models: str, *, moved: bool) -> asyncio.Task[httpx.Response]:
    """A request to `chat` that does not end, begun before an edit to `models`, and to another port where it `moved`."""
    scene.model("chat", token_seconds=0.02)
    scene.model("other")
    scene.write(TWO)
    scene.start(drain_timeout=300)
    await scene.event("applied")
    asked = asyncio.create_task(ask(scene, model="chat", max_tokens=LONG))
    await in_flight(scene)
    if moved:
        scene.lm = f"lm: {{port: {free_port()}}}"
    scene.write(models)
    await scene.event("applied", 2)
    return asked


@pytest.mark.parametrize(("models", "moved"), [(TWO, True), (REPLACED, False), (REPLACED, True), (REMOVED, True)])
async def test_what_is_being_drained_gets_no_more_time_than_the_rest(scene: Scene, models: str, *, moved: bool) -> None:
    asked = await edited_at_work(scene, models, moved=moved)
    assert scene.runner is not None
    assert scene.running is not None
    scene.runner._end(0.0)
    async with asyncio.timeout(30):
        await scene.running
        assert (await asked).status_code == 503


async def test_a_second_signal_stops_it_too(scene: Scene) -> None:
    asked = await edited_at_work(scene, REPLACED, moved=True)
    assert scene.runner is not None
    assert scene.running is not None
    scene.runner._interrupted(signal.SIGINT)
    assert not (await asyncio.wait([asked], timeout=0.2))[0], "it is let finish"
    scene.runner._interrupted(signal.SIGINT)
    async with asyncio.timeout(30):
        await scene.running
        assert (await asked).status_code in (500, 503)


async def test_another_down_with_less_time_counts(scene: Scene) -> None:
    asked = await edited_at_work(scene, TWO, moved=True)
    assert scene.runner is not None
    assert scene.running is not None
    control = scene.runner._folder.control_socket
    await asyncio.to_thread(client.request, control, "down")
    assert not (await asyncio.wait([asked], timeout=0.2))[0], "it is let finish"
    await asyncio.to_thread(client.request, control, "down", drain=0)
    async with asyncio.timeout(30):
        await scene.running
        assert (await asked).status_code == 503
