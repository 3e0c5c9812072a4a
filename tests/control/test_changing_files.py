"""Files that change while they are loaded: what an engine has read must be what was planned."""

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from runner.control.engine_process import EngineProcess
from runner.plan.digests import DigestCache, adapter_digest, model_digest
from runner.protocol import AdapterSource
from tests.control.asking import ONE, pid, text
from tests.control.scene import Scene


def digest(scene: Scene, kind: str, name: str) -> str:
    take = model_digest if kind == "models" else adapter_digest
    return take(scene.folder / kind / name, DigestCache()).digest


async def test_an_adapter_that_changes_under_its_load_is_planned_again(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene.write("chat: {source: ./models/chat}")
    scene.start()
    await scene.event("applied")
    load = EngineProcess.load_adapter
    asked: list[str] = []

    async def meanwhile(self: EngineProcess, adapter: AdapterSource) -> None:
        if not asked:
            scene.adapter("pirate", version=9)
        asked.append(adapter.key)
        await load(self, adapter)

    monkeypatch.setattr(EngineProcess, "load_adapter", meanwhile)
    scene.write(ONE)
    await scene.event("applied", 2)
    said = (await scene.event("source_changed"))["error"]
    assert f"models.chat.adapters.pirate: the files in {scene.folder}/adapters/pirate changed" in said
    key = digest(scene, "adapters", "pirate")
    assert asked[-1] == key
    assert (await text(scene, adapter_name="pirate")).startswith(key)
    engine = scene.live.deployments["chat"].engine
    await scene.live.settle()
    assert set(asked) - {key}, "the first was another"
    assert [a.key for a in scene.live.deployments["chat"].spec.adapters] == [key]
    assert engine.pid == pid(scene)


@pytest.mark.parametrize("first", [True, False])
async def test_a_model_that_changes_under_its_load_is_planned_again(scene: Scene, first: bool) -> None:
    scene.model("slow", load_seconds=0.6)
    engines = scene.folder / "state" / "dev" / "e"
    if not first:
        scene.write(ONE)
        scene.start()
        await scene.event("applied")
    scene.write("chat: {source: ./models/slow}")
    if first:
        scene.start()
    async with asyncio.timeout(15):
        while len(list(engines.glob("*.sock"))) < (1 if first else 2):
            await asyncio.sleep(0.01)
    scene.model("slow", load_seconds=0.0)
    await scene.event("source_changed")
    await scene.event("applied", 1 if first else 2)
    assert scene.live.deployments["chat"].spec.weights_digest == digest(scene, "models", "slow")
    assert (await text(scene)).startswith("base ")


async def test_a_file_that_never_stays_is_given_up_and_tried_later(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene.write(ONE)
    scene.start()
    await scene.event("applied")
    load = EngineProcess.load_adapter
    versions = iter(range(20, 40))
    restless = True

    async def meanwhile(self: EngineProcess, adapter: AdapterSource) -> None:
        if restless:
            scene.adapter("shout", version=next(versions))
        await load(self, adapter)

    monkeypatch.setattr(EngineProcess, "load_adapter", meanwhile)
    scene.write("chat: {source: ./models/chat, adapters: {shout: ./adapters/shout}}")
    failed = await scene.event("apply_failed")
    assert "files changed while they were loaded" in failed["error"]
    assert len([e for e in scene.events if e["event"] == "source_changed"]) == 2
    assert (await text(scene, adapter_name="pirate")) != "", "what ran goes on"
    restless = False
    await scene.event("applied", 2)
    assert (await text(scene, adapter_name="shout")).startswith(digest(scene, "adapters", "shout"))


async def test_an_engine_that_comes_back_from_other_files_says_so(scene: Scene) -> None:
    scene.write(ONE)
    scene.start()
    await scene.event("applied")
    scene.adapter("pirate", version=9)
    scene.write("chat: {sauce: 1}")  # so that the change of the adapter cannot be planned
    await scene.event("apply_failed")
    os.kill(pid(scene), signal.SIGKILL)
    await scene.event("engine_restarted")
    degraded: dict[str, Any] = scene.live.deployments["chat"].health.as_json["Degraded"]
    assert degraded["status"] == "true"
    changed = scene.live.deployments["chat"].health._changed
    assert f"the files in {scene.folder}/adapters/pirate changed" in changed
    scene.write(ONE)
    await scene.event("applied", 2)
    assert scene.live.deployments["chat"].health._changed == ""
    assert (await text(scene, adapter_name="pirate")).startswith(digest(scene, "adapters", "pirate"))


def test_the_draft_counts(tmp_path: Path) -> None:
    from runner.plan.spec import DraftSpec, ModelSpec
    from runner.plan.verify import changed_sources

    scene = Scene(tmp_path)
    scene.model("chat")
    scene.model("draft")
    spec = ModelSpec(
        "chat", "./m", tmp_path / "models" / "chat", digest(scene, "models", "chat"), 1,
        draft=DraftSpec("./d", tmp_path / "models" / "draft", digest(scene, "models", "draft")),
    )  # fmt: skip
    assert list(changed_sources(spec, DigestCache())) == []
    scene.model("draft", load_seconds=1)
    (found,) = changed_sources(spec, DigestCache())
    assert found.path == "models.chat.draft"
