"""Limits and adapters that were edited while no engine was there to be told of them."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from runner.plan.spec import ModelSpec
from runner.plan.verify import Changed
from tests.control.asking import pid, text
from tests.control.scene import Scene
from tests.control.test_adoption import killed_runner, linux


def chat(context: int, more: str = "") -> str:
    return f"chat: {{source: ./models/chat, kv_cache: {{max_context: {context}}}{more}}}"


def held_back(scene: Scene) -> Path:
    """Chat loads once this file is there."""
    file = scene.folder / "may-load"
    scene.model("chat", waits_for=str(file))
    return file


async def loading(scene: Scene) -> None:
    async with asyncio.timeout(15):
        while scene.live.deployments["chat"].starting.engine is None:
            await asyncio.sleep(0.01)


async def test_an_engine_that_comes_back_has_those_of_now(scene: Scene) -> None:
    may_load = held_back(scene)
    may_load.touch()
    scene.write(chat(8))
    scene.start()
    await scene.event("applied")
    may_load.unlink()
    os.kill(pid(scene), signal.SIGKILL)
    await loading(scene)
    scene.write(chat(32))
    await scene.event("applied", 2)
    may_load.touch()
    await scene.event("engine_restarted")
    assert len((await text(scene, max_tokens=16)).split()) == 16


async def test_an_engine_that_is_loaded_on_demand_has_those_of_now(scene: Scene) -> None:
    may_load = held_back(scene)
    scene.write(chat(8, ", load: on_demand"))
    scene.start()
    await scene.event("applied")
    asked = asyncio.create_task(text(scene, max_tokens=2))
    await loading(scene)
    scene.write(chat(32, ", load: on_demand"))
    await scene.event("applied", 2)
    may_load.touch()
    await asked
    assert len((await text(scene, max_tokens=16)).split()) == 16


@linux
async def test_an_engine_that_was_left_behind_has_those_of_now(scene: Scene) -> None:
    scene.write(chat(8))
    engine = await killed_runner(scene)
    scene.write(chat(32))
    scene.start()
    await scene.until(lambda: any(e["event"] in ("applied", "unchanged") for e in scene.events))
    assert pid(scene) == engine
    assert len((await text(scene, max_tokens=16)).split()) == 16


async def test_engines_are_told_what_another_memory_limit_leaves_them(scene: Scene) -> None:
    scene.write(chat(32), top="memory: {limit: 8GiB}")
    scene.start()
    await scene.event("applied")
    engine = scene.live.deployments["chat"].engine
    assert engine.spec.budget_bytes > 200 * 2**20
    for top, most in (("memory: {limit: 200MiB}", 200 * 2**20), ("", 0)):
        scene.write(chat(32), top=top)
        async with asyncio.timeout(15):
            while engine.stats is None or not (engine.stats.budget_bytes <= most):
                await asyncio.sleep(0.01)
    assert scene.live.deployments["chat"].engine is engine


async def test_an_adapter_that_comes_as_the_engine_is_about_to_serve_is_there(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene.write(chat(32, ", adapters: {pirate: ./adapters/pirate}"))
    scene.start()
    await scene.event("applied")
    sources = scene.live.deployments["chat"].starting._sources
    looked, edited = asyncio.Event(), asyncio.Event()
    look = sources.changed

    async def changed(models: list[ModelSpec]) -> list[Changed]:
        found: list[Changed] = await look(models)
        looked.set()
        await edited.wait()
        return found

    monkeypatch.setattr(sources, "changed", changed)
    os.kill(pid(scene), signal.SIGKILL)
    await looked.wait()
    scene.write(chat(32, ", adapters: {shout: ./adapters/shout}"))
    await scene.event("applied", 2)
    edited.set()
    await scene.event("engine_restarted")
    (shout,) = scene.live.deployments["chat"].spec.adapters
    assert (await text(scene, adapter_name="shout")).startswith(shout.key)
    engine = scene.live.deployments["chat"].engine
    async with asyncio.timeout(15):
        while engine.stats is None or engine.stats.adapters != [shout.key]:
            await asyncio.sleep(0.01)
