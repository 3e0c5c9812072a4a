"""All or nothing: whatever goes wrong in a plan, and wherever, what was live before it is live after it."""

import asyncio
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from runner.control.directory import Directory
from runner.control.executor import Executor
from runner.plan.planner import plan
from tests.control.asking import ONE, ask, pid, text
from tests.control.scene import Scene, free_port


async def start(scene: Scene, models: str = ONE, top: str = "") -> None:
    scene.write(models, top=top)
    scene.start()
    await scene.event("applied")


def standing(scene: Scene) -> Mapping[str, Any]:
    """What is live: specs, processes and ports."""
    live = scene.live
    return {
        "models": {name: (d.spec, d.engine.pid if d.engine else None) for name, d in live.deployments.items()},
        "ports": {name: listener.address for name, listener in live.listeners.items()},
        "committed": live.committed,
        "coming": dict(live.coming),
    }


async def test_an_engine_that_dies_in_its_warm_up(scene: Scene) -> None:
    scene.model("mayfly", die_loading=True)
    await start(scene)
    before = standing(scene)
    scene.write(f"{ONE.replace('models/chat', 'models/mayfly')}\nnew: {{source: ./models/chat}}")
    failed = await scene.event("apply_failed")
    assert "the engine of chat was ended by SIGKILL" in failed["error"]
    assert standing(scene) == before
    assert (await text(scene, adapter_name="pirate")) != ""


async def test_an_engine_that_dies_while_others_load(scene: Scene) -> None:
    scene.model("mayfly", lives=0.05)
    scene.model("slow", load_seconds=1.0)
    await start(scene)
    before = standing(scene)
    scene.write("chat: {source: ./models/mayfly}\nslow: {source: ./models/slow}")
    failed = await scene.event("apply_failed")
    assert "the engine of chat ended while others were loading" in failed["error"]
    assert standing(scene) == before
    assert (await text(scene, adapter_name="pirate")) != ""


async def test_a_fault_in_the_middle_of_a_commit(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.model("other")
    await start(scene, f"{ONE}\ngone: {{source: ./models/chat}}\nold: {{source: ./models/chat, aliases: [x]}}")
    before, port = standing(scene), scene.port()
    publish = Directory.publish

    def broken(self: Directory, *arguments: Any, **fields: Any) -> None:
        monkeypatch.setattr(Directory, "publish", publish)
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(Directory, "publish", broken)
    scene.lm = f"lm: {{port: {port}, cors: {{allow_origins: ['*']}}}}"
    scene.write(
        "chat: {source: ./models/other, batching: {max_rows: 2}}\n"
        "renamed: {source: ./models/chat, aliases: [x]}\n"
        "new: {source: ./models/other}",
        servers=f"more: {{port: {free_port()}}}",
    )
    failed = await scene.event("apply_failed")
    assert "unexpected ZeroDivisionError: a bug" in failed["error"]
    assert standing(scene) == before
    for model in ("chat:pirate", "gone", "old", "x"):
        assert (await text(scene, model=model)) != ""
    assert (await ask(scene, model="new")).status_code == 404
    scene.write("chat: {source: ./models/other}")
    await scene.event("applied", 2)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full device here")
async def test_a_disk_that_is_full_when_the_generation_is_written(scene: Scene) -> None:
    await start(scene)
    before = standing(scene)
    full = scene.live.folder.generations / f".00000002.json.{os.getpid()}"
    full.symlink_to("/dev/full")
    scene.write(f"{ONE}\nnew: {{source: ./models/chat}}")
    failed = await scene.event("apply_failed")
    assert "generation 2 cannot be kept" in failed["error"]
    assert "No space left on device" in failed["error"]
    assert standing(scene) == before
    full.unlink(missing_ok=True)
    scene.write(f"{ONE}\nnewer: {{source: ./models/chat}}")
    await scene.event("applied", 2)


BIG = "memory: {limit: 1500MiB}"


def big(source: str, name: str = "chat") -> str:
    return f"{name}: {{source: ./models/{source}, kv_cache: {{prefix_cache: 0}}}}"


async def test_what_made_room_comes_back(scene: Scene) -> None:
    scene.model("one", mib=1000)
    scene.model("broken", mib=1000, refuse="no such architecture", load_seconds=0.2)
    await start(scene, f"{big('one')}\ntiny: {{source: ./models/chat, kv_cache: {{prefix_cache: 0}}}}", top=BIG)
    specs = {name: d.spec for name, d in scene.live.deployments.items()}
    engine, tiny = pid(scene), pid(scene, "tiny")
    scene.write(big("broken", "other"), top=BIG)
    planned = (await scene.event("planned", 2))["plan"]
    assert [(a["action"], a["target"], a.get("first")) for a in planned["actions"]] == [
        ("update", "servers.lm", None), ("stop", "models.chat", True), ("start", "models.other", None),
        ("stop", "models.tiny", False),
    ]  # fmt: skip
    await scene.until(lambda: scene.live.deployments["chat"].state == "replacing")
    waiting = asyncio.create_task(text(scene, model="chat"))
    failed = await scene.event("apply_failed")
    assert "no such architecture" in failed["error"]
    assert {name: d.spec for name, d in scene.live.deployments.items()} == specs
    assert (await waiting).startswith("base "), "who waited is served by the engine that came back"
    assert pid(scene) != engine
    assert pid(scene, "tiny") == tiny


async def test_what_made_room_and_does_not_come_back_is_tried_again(scene: Scene) -> None:
    scene.model("one", mib=1000)
    scene.model("broken", mib=1000, refuse="no such architecture", load_seconds=0.5)
    await start(scene, big("one"), top=BIG)
    scene.write(big("broken"), top=BIG)
    await scene.event("action_started", 3)
    config = scene.folder / "models" / "one" / "config.json"
    sound = config.read_text()
    config.write_text(json.dumps({"model_type": "llama", "fake": {"refuse": "not now"}}))
    await scene.event("apply_failed")
    deployment = scene.live.deployments["chat"]
    assert deployment.state == "backoff"
    assert "not now" in deployment.last_error
    config.write_text(sound)
    await scene.event("engine_restarted")
    assert (await text(scene)).startswith("base ")


async def test_a_listener_that_had_given_its_port_back(scene: Scene) -> None:
    scene.model("broken", refuse="no such architecture")
    await start(scene)
    before, old = standing(scene), scene.lm
    scene.lm = old.replace("}", ", host: 127.0.0.2}")
    scene.write("chat: {source: ./models/broken}")
    await scene.event("apply_failed")
    assert standing(scene) == before
    assert (await text(scene, adapter_name="pirate")) != ""


async def test_a_runner_that_stops_in_the_middle(scene: Scene) -> None:
    scene.model("slow", load_seconds=30)
    await start(scene)
    scene.write(f"{ONE}\nslow: {{source: ./models/slow}}", servers=f"more: {{port: {free_port()}}}")
    await scene.event("listening", 2)
    # The fixture stops the runner now, and looks for engines that are left.


async def test_cancelling_a_plan_twice_still_undoes_all_of_it(scene: Scene) -> None:
    scene.model("slow", load_seconds=30)
    scene.model("one", mib=1000)
    await start(scene, big("one"), top=BIG)
    before = standing(scene)
    assert scene.runner is not None
    scene.write(f"{big('one')}\nslow: {{source: ./models/slow}}", top=BIG)
    compiled = await asyncio.to_thread(scene.runner._compiler.compile, (scene.manifest,), "dev")
    made = plan(compiled.desired, scene.live.observe(2**31))

    async def never() -> None:
        raise AssertionError("nothing is recorded of a plan that is cancelled")

    work = asyncio.create_task(Executor(scene.live, made, compiled.desired).execute(never))
    await scene.until(lambda: scene.live.coming)
    work.cancel()
    await asyncio.sleep(0)
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert standing(scene) == before
