"""How a plan is carried out, over real engine processes (that need no MLX): what is kept, and what a failure leaves."""

import asyncio
import os
import signal

from tests.control.asking import ONE, ask, in_flight, pid, text
from tests.control.scene import Scene, free_port


async def start(scene: Scene, models: str = ONE, top: str = "") -> None:
    scene.write(models, top=top)
    scene.start()
    await scene.event("applied")


def carried_out(scene: Scene) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The last plan that was told, and what was said to be done since, both in the order of the targets."""
    at = max(i for i, event in enumerate(scene.events) if event["event"] == "planned")
    planned = [(a["action"], a["target"]) for a in scene.events[at]["plan"]["actions"]]
    done = [(e["action"], e["target"]) for e in scene.events[at:] if e["event"] == "action_done"]
    return sorted(planned), sorted(done)


async def test_what_was_planned_is_what_is_done(scene: Scene) -> None:
    scene.model("other")
    await start(scene, f"{ONE}\ngone: {{source: ./models/chat}}")
    planned, done = carried_out(scene)
    assert planned == done == [("open", "servers.lm"), ("start", "models.chat"), ("start", "models.gone")]
    scene.lm = f"lm: {{port: {free_port()}}}"
    scene.write(
        "chat: {source: ./models/other}\nnew: {source: ./models/chat}", servers=f"more: {{port: {free_port()}}}"
    )
    await scene.event("applied", 2)
    planned, done = carried_out(scene)
    assert planned == done
    assert done == [
        ("move", "servers.lm"), ("open", "servers.more"), ("rename", "models.new"), ("replace", "models.chat"),
    ]  # fmt: skip


async def test_a_renamed_model_keeps_its_engine_its_requests_and_its_log(scene: Scene) -> None:
    scene.model("chat", token_seconds=0.02)
    await start(scene)
    engine = pid(scene)
    streaming = asyncio.create_task(text(scene, max_tokens=30))
    await in_flight(scene)
    scene.write(ONE.replace("chat:", "talk:", 1).replace("pirate: ./", "bold: ./", 1))
    await scene.event("applied", 2)
    assert pid(scene, "talk") == engine
    assert len((await streaming).split()) == 30
    assert (await text(scene, model="talk:bold")).startswith(scene.live.deployments["talk"].spec.adapters[0].key)
    assert (await ask(scene, model="chat")).status_code == 404
    await scene.live.settle()
    folder = scene.live.folder
    assert folder.engine_log("talk").exists()
    assert not folder.engine_log("chat").exists()
    os.kill(engine, signal.SIGKILL)  # it comes back under its new name
    assert (await scene.event("engine_restarted"))["target"] == "models.talk"


async def test_models_that_swap_their_sources_swap_their_engines(scene: Scene) -> None:
    scene.model("other")
    await start(scene, "a: {source: ./models/chat}\nb: {source: ./models/other}")
    a, b = pid(scene, "a"), pid(scene, "b")
    scene.write("a: {source: ./models/other}\nb: {source: ./models/chat}")
    await scene.event("applied", 2)
    assert (pid(scene, "a"), pid(scene, "b")) == (b, a)
    assert len(await text(scene, model="a")) > 0
    specs = {name: d.spec.source for name, d in scene.live.deployments.items()}
    assert specs == {"a": "./models/other", "b": "./models/chat"}


async def test_a_name_that_moves_on_is_taken_by_another_model(scene: Scene) -> None:
    scene.model("other")
    await start(scene, "chat: {source: ./models/chat}")
    engine = pid(scene)
    scene.write("chat: {source: ./models/other}\nchat-old: {source: ./models/chat}")
    await scene.event("applied", 2)
    assert pid(scene, "chat-old") == engine != pid(scene, "chat")


async def test_a_failed_plan_leaves_names_where_they_were(scene: Scene) -> None:
    scene.model("broken", refuse="no such architecture")
    await start(scene, "chat: {source: ./models/chat}")
    engine = pid(scene)
    scene.write("chat: {source: ./models/broken}\nchat-old: {source: ./models/chat}")
    await scene.event("apply_failed")
    assert list(scene.live.deployments) == ["chat"]
    assert pid(scene) == engine
    assert (await ask(scene, model="chat-old")).status_code == 404
    assert scene.runner is not None
    assert list(scene.live.deployments) == ["chat"]
