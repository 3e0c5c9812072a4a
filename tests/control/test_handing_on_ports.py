"""Edits after which a port belongs to another server than before."""

from __future__ import annotations

import socket

import pytest

from runner.control import preparation
from runner.control.live import Live
from runner.control.ports import open_listener
from runner.errors import ListenerError
from runner.gateway.listener import Listener
from runner.plan.spec import ListenerSpec
from tests.control.asking import text
from tests.control.scene import Scene, free_port

ONE = "chat: {source: ./models/chat}"


async def two_servers(scene: Scene) -> tuple[int, int]:
    """`lm` and `more`, up; their ports."""
    first, second = free_port(), free_port()
    scene.lm = f"lm: {{port: {first}}}"
    scene.write(ONE, servers=f"more: {{port: {second}}}")
    scene.start()
    await scene.event("applied")
    return first, second


async def ports(scene: Scene, number: int) -> dict[str, int]:
    """What they are after so many applied edits, once each has answered."""
    await scene.event("applied", number)
    found = {name: scene.port(name) for name in scene.live.listeners}
    for port in found.values():
        assert (await text(scene, port=port)).startswith("base ")
    return found


async def test_two_servers_swap_them(scene: Scene) -> None:
    first, second = await two_servers(scene)
    scene.lm = f"lm: {{port: {second}}}"
    scene.write(ONE, servers=f"more: {{port: {first}}}")
    assert await ports(scene, 2) == {"lm": second, "more": first}


async def test_a_server_gets_another_name(scene: Scene) -> None:
    first, second = await two_servers(scene)
    scene.write(ONE, servers=f"other: {{port: {second}}}")
    assert await ports(scene, 2) == {"lm": first, "other": second}


async def test_a_server_moves_on_and_another_takes_its_place(scene: Scene) -> None:
    first, second = await two_servers(scene)
    third = free_port()
    scene.lm = f"lm: {{port: {second}}}"
    scene.write(ONE, servers=f"more: {{port: {third}}}\nnew: {{port: {first}}}")
    assert await ports(scene, 2) == {"lm": second, "more": third, "new": first}


async def test_where_one_cannot_be_opened_each_has_its_own_again(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = await two_servers(scene)
    opened: list[str] = []

    async def fails_once(live: Live, spec: ListenerSpec, sock: socket.socket | None = None) -> Listener:
        opened.append(spec.name)
        if len(opened) == 2:
            raise ListenerError("somebody else was faster")
        return await open_listener(live, spec, sock)

    monkeypatch.setattr(preparation, "open_listener", fails_once)
    scene.lm = f"lm: {{port: {second}}}"
    scene.write(ONE, servers=f"more: {{port: {first}}}")
    await scene.event("apply_failed")
    assert {name: scene.port(name) for name in scene.live.listeners} == {"lm": first, "more": second}
    assert await ports(scene, 2) == {"lm": second, "more": first}, "it is tried again"
