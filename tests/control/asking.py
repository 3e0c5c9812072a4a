"""Requests to a scene's runner, over HTTP as clients send them."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx

from tests.control.scene import Scene

ONE = "chat: {source: ./models/chat, adapters: {pirate: ./adapters/pirate}}"


async def ask(scene: Scene, path: str = "/v1/completions", port: int | None = None, **body: Any) -> httpx.Response:
    """One request, to `lm` unless there is a port."""
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port or scene.port()}", timeout=15) as client:
        return await client.post(path, json={"prompt": "hi", **body})


async def text(scene: Scene, **body: Any) -> str:
    """The text of one that must not fail."""
    response = await ask(scene, **body)
    assert response.status_code == 200, response.text
    answer: str = response.json()["choices"][0]["text"]
    return answer


def pid(scene: Scene, name: str = "chat") -> int:
    """The process that serves a model."""
    found: int = scene.live.deployments[name].engine.pid
    return found


async def in_flight(scene: Scene, name: str = "chat", count: int = 1) -> None:
    """Returns once so many requests are in a model's engine. Raises TimeoutError."""
    async with asyncio.timeout(10):
        while scene.live.deployments[name].engine.connection.in_flight < count:
            await asyncio.sleep(0.005)
