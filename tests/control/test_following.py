"""A running runner follows all that its manifest is made of, and settles on the last of many saves."""

from __future__ import annotations

import asyncio
import socket

import httpx
import pytest

from tests.control.scene import Scene, free_port

ONE = "chat: {source: ./models/chat}"


def _applied(scene: Scene) -> int:
    return len([e for e in scene.events if e["event"] == "applied"])


def _aliases(scene: Scene) -> tuple[str, ...]:
    aliases: tuple[str, ...] = scene.live.deployments["chat"].spec.aliases
    return aliases


async def test_ten_saves_in_a_second_are_one_settled_result(scene: Scene) -> None:
    scene.write(ONE)
    scene.start()
    await scene.event("applied")
    for number in range(10):
        scene.write(f"chat: {{source: ./models/chat, aliases: [save-{number}]}}")
        await asyncio.sleep(0.1)
    await scene.event("applied", 2)
    assert _aliases(scene) == ("save-9",)
    await asyncio.sleep(0.5)
    assert _applied(scene) == 2
    assert scene.runner is not None
    assert scene.runner.status()["in_sync"]


async def test_a_secret_that_is_missing_is_waited_for(scene: Scene) -> None:
    scene.write(ONE)
    scene.start()
    await scene.event("applied")
    port = free_port()
    scene.write(ONE, servers=f'lan: {{port: {port}, auth: {{api_keys: ["${{file:keys/lan}}"]}}}}')
    failed = await scene.event("apply_failed")
    assert "E503" in failed["error"]
    (scene.folder / "keys").mkdir()
    (scene.folder / "keys" / "lan").write_text("key-1\n")
    await scene.event("applied", 2)
    url = f"http://127.0.0.1:{port}/v1/models"
    async with httpx.AsyncClient(timeout=15) as client:
        assert (await client.get(url, headers={"Authorization": "Bearer key-1"})).status_code == 200
        (scene.folder / "keys" / "lan").write_text("key-2\n")
        await scene.event("applied", 3)
        assert (await client.get(url, headers={"Authorization": "Bearer key-1"})).status_code == 401
        assert (await client.get(url, headers={"Authorization": "Bearer key-2"})).status_code == 200


async def test_an_env_file_that_appears_and_changes(scene: Scene) -> None:
    scene.write(
        'chat: {source: ./models/chat, aliases: ["${ALIAS:-none}"]}',
        top="env_file: [{path: local.env, required: false}]",
    )
    scene.start()
    await scene.event("applied")
    assert _aliases(scene) == ("none",)
    for count, alias in ((2, "one"), (3, "two")):
        (scene.folder / "local.env").write_text(f"ALIAS={alias}\n")
        await scene.event("applied", count)
        assert _aliases(scene) == (alias,)
    (scene.folder / "local.env").write_text("# the same\nALIAS=two\n")
    await scene.event("unchanged")
    (scene.folder / "local.env").write_text("ALIAS\n = 5\n")
    failed = await scene.event("apply_failed")
    assert "local.env:2:1" in failed["error"]
    assert _aliases(scene) == ("two",)


async def test_a_broken_save_and_its_repair_while_the_runner_is_busy_with_an_edit(scene: Scene) -> None:
    scene.model("slow", load_seconds=0.6)
    scene.write(ONE)
    scene.start()
    await scene.event("applied")
    scene.write(f"{ONE}\nslow: {{source: ./models/slow}}")
    await scene.event("action_started", 2)
    scene.manifest.write_text("name: [\n")
    await asyncio.sleep(0.05)
    scene.write("chat: {source: ./models/chat, aliases: [repaired]}")
    await scene.until(lambda: _aliases(scene) == ("repaired",))
    await scene.until(lambda: list(scene.live.deployments) == ["chat"])


async def test_a_failed_load_does_not_end_the_watch(scene: Scene) -> None:
    scene.model("broken", refuse="no such architecture")
    scene.write(ONE)
    scene.start()
    await scene.event("applied")
    for count, text in enumerate(("chat: {source: ./models/broken}", "chat: {", "chat: {source: ./no/such}"), 1):
        scene.write(text)
        await scene.event("apply_failed", count)
    scene.write("chat: {source: ./models/chat, aliases: [alive]}")
    await scene.event("applied", 2)
    assert _aliases(scene) == ("alive",)


async def test_a_model_that_left_the_manifest_is_gone_and_an_unrelated_edit_unloads_nothing(scene: Scene) -> None:
    scene.model("other")
    scene.write(f"{ONE}\nother: {{source: ./models/other}}")
    scene.start()
    await scene.event("applied")
    pid = scene.live.deployments["chat"].engine.pid
    scene.write(ONE, servers=f"more: {{port: {free_port()}}}")
    await scene.event("applied", 2)
    assert list(scene.live.deployments) == ["chat"]
    assert scene.live.deployments["chat"].engine.pid == pid
    with socket.create_connection(("127.0.0.1", scene.port("more")), timeout=5):
        pass


@pytest.mark.parametrize(
    "models",
    [f"chat: {{source: ./{'x' * 300}}}", 'chat: {source: "./a\\0b"}', "chat: {source: ~nobody-of-that-name/x}"],
)
async def test_a_path_that_cannot_be_is_an_edit_like_any_other(scene: Scene, models: str) -> None:
    scene.write(ONE)
    scene.start()
    await scene.event("applied")
    files = "env_file: [{path: ./" + "y" * 300 + ", required: false}]"
    scene.write(models, top=files)
    await scene.event("apply_failed")
    scene.write(models)
    failed = await scene.event("apply_failed", 2)
    assert ":models.chat.source: " in failed["error"].replace(": models", ":models"), failed["error"]
    scene.write("chat: {source: ./models/chat, aliases: [again]}")
    await scene.event("applied", 2)
    assert _aliases(scene) == ("again",)
