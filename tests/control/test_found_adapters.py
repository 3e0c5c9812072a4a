"""Folders of adapters that a pattern finds, under a running engine: dropping one in is the edit."""

from __future__ import annotations

import shutil

import httpx

from tests.control.scene import Scene

FOUND = "chat: {source: ./models/chat, adapters: {from: ./found/*}}"


async def _served(scene: Scene, adapter: str) -> bool:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{scene.port()}", timeout=15) as client:
        answer = await client.post("/v1/completions", json={"prompt": "hi", "adapter_name": adapter})
    return answer.status_code == 200


async def _adapters(scene: Scene, *names: str) -> None:
    def are() -> bool:
        return [a.name for a in scene.live.deployments["chat"].spec.adapters] == list(names)

    await scene.until(are)


async def _warned(scene: Scene, words: str) -> None:
    def told() -> bool:
        return any(words in w for e in scene.events if e["event"] == "warned" for w in e["warnings"])

    await scene.until(told)


def _drop(scene: Scene, name: str) -> None:
    """Copy a whole adapter in, as `cp -r` does."""
    shutil.copytree(scene.folder / "adapters" / name, scene.folder / "found" / name)


async def test_a_folder_is_dropped_in_changed_and_removed(scene: Scene) -> None:
    scene.write(FOUND)
    scene.start()
    await scene.event("applied")
    pid = scene.live.deployments["chat"].engine.pid
    assert not await _served(scene, "pirate")
    _drop(scene, "pirate")  # the folder above it was not there either
    await _adapters(scene, "pirate")
    assert await _served(scene, "pirate")
    _drop(scene, "shout")
    await _adapters(scene, "pirate", "shout")
    key = scene.live.deployments["chat"].spec.adapters[0].key
    config = scene.folder / "found" / "pirate" / "adapter_config.json"
    config.write_text(config.read_text().replace('"scale": 1', '"scale": 5'))
    await scene.until(lambda: scene.live.deployments["chat"].spec.adapters[0].key != key)
    shutil.rmtree(scene.folder / "found" / "pirate")
    await _adapters(scene, "shout")
    assert not await _served(scene, "pirate")
    assert scene.live.deployments["chat"].engine.pid == pid
    assert not [e for e in scene.events if e["event"] == "apply_failed"]


async def test_a_half_copied_folder_is_a_warning_and_holds_up_no_other_edit(scene: Scene) -> None:
    _drop(scene, "pirate")
    scene.write(FOUND)
    scene.start()
    await scene.event("applied")
    assert scene.runner is not None
    weights = (scene.folder / "adapters" / "shout" / "adapters.safetensors").read_bytes()
    half = scene.folder / "found" / "shout"
    half.mkdir()
    await _warned(scene, "holds no adapter_config.json")
    (half / "adapters.safetensors").write_bytes(weights[:50])
    shutil.copy(scene.folder / "adapters" / "shout" / "adapter_config.json", half)
    await _warned(scene, "half-written")
    scene.write(FOUND.replace("source:", "aliases: [edited], source:"))
    await scene.until(lambda: scene.live.deployments["chat"].spec.aliases == ("edited",))
    assert [w["code"] for w in scene.runner.status()["warnings"]] == ["W612"]
    (half / "adapters.safetensors").write_bytes(weights)
    await _adapters(scene, "pirate", "shout")
    assert await _served(scene, "shout")
    assert scene.runner.status()["warnings"] == []
    assert not [e for e in scene.events if e["event"] == "apply_failed"]


async def test_an_adapter_goes_on_as_it_was_while_it_is_written_anew(scene: Scene) -> None:
    _drop(scene, "pirate")
    scene.write(FOUND)
    scene.start()
    await scene.event("applied")
    key = scene.live.deployments["chat"].spec.adapters[0].key
    weights = scene.folder / "found" / "pirate" / "adapters.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:60])
    await _warned(scene, "served as it was")
    assert scene.live.deployments["chat"].spec.adapters[0].key == key
    assert await _served(scene, "pirate")
    weights.write_bytes(whole[:-4] + b"\1\0\0\0")
    await scene.event("applied", 2)
    assert scene.live.deployments["chat"].spec.adapters[0].key != key
    assert await _served(scene, "pirate")
