"""The control plane over real engine processes (that need no MLX) and real ports."""

import asyncio
import os
import signal
import socket

import httpx
import pytest

from runner.control.ledger import Cause
from tests.control.asking import ONE, ask, in_flight, pid, text
from tests.control.scene import Scene, free_port


async def test_from_a_manifest_to_an_answer_to_an_end(scene: Scene) -> None:
    scene.write(ONE)
    running = scene.start()
    await scene.event("applied")
    assert (await text(scene)).startswith("base ")
    key = scene.live.deployments["chat"].spec.adapters[0].key
    assert (await text(scene, adapter_name="pirate")).startswith(key)
    assert (await text(scene, model="chat:pirate")).startswith(key)
    assert scene.runner is not None
    scene.runner._stop.set()
    result = await running
    assert result.error is None


async def test_an_adapter_is_added_changed_and_removed_in_place(scene: Scene) -> None:
    scene.write(ONE)
    scene.start()
    await scene.event("applied")
    engine = pid(scene)
    scene.write("chat: {source: ./models/chat, adapters: {pirate: ./adapters/pirate, new: ./adapters/shout}}")
    await scene.event("applied", 2)
    new = await text(scene, adapter_name="new")
    scene.adapter("pirate", version=7)
    await scene.event("applied", 3)
    assert await text(scene, adapter_name="pirate") != new
    scene.write("chat: {source: ./models/chat, adapters: {new: ./adapters/shout}}")
    await scene.event("applied", 4)
    assert (await ask(scene, adapter_name="pirate")).status_code == 404
    assert await text(scene, adapter_name="new") == new
    assert pid(scene) == engine


async def test_a_refused_adapter_changes_nothing_and_says_why(scene: Scene) -> None:
    scene.adapter("bad", version=9, refused=True)
    scene.write(ONE)
    scene.start()
    await scene.event("applied")
    scene.write("chat: {source: ./models/chat, adapters: {shout: ./adapters/shout, bad: ./adapters/bad}}")
    failed = await scene.event("apply_failed")
    assert "applies to no layer" in failed["error"]
    assert (await ask(scene, adapter_name="shout")).status_code == 404
    assert (await text(scene, adapter_name="pirate")) != ""
    assert scene.runner is not None
    assert "applies to no layer" in scene.runner.status()["manifest_error"]


async def test_another_model_takes_over_once_it_is_ready(scene: Scene) -> None:
    scene.model("other", load_seconds=0.3)
    scene.write(ONE)
    scene.start()
    await scene.event("applied")
    old = pid(scene)
    scene.write("chat: {source: ./models/other, adapters: {pirate: ./adapters/pirate}}")
    await scene.event("action_started", 2)
    assert (await text(scene)).startswith("base "), "the old one serves until then"
    await scene.event("applied", 2)
    assert pid(scene) != old
    assert (await text(scene)).startswith("base ")


async def test_a_drafts_files_are_watched_and_its_length_changes_in_place(scene: Scene) -> None:
    scene.model("small")
    scene.write("chat: {source: ./models/chat, draft: {source: ./models/small}}")
    scene.start()
    await scene.event("applied")
    first = pid(scene)
    scene.write("chat: {source: ./models/chat, draft: {source: ./models/small, num_draft_tokens: 2}}")
    await scene.event("applied", 2)
    assert pid(scene) == first
    scene.model("small", load_seconds=0.01)
    await scene.event("applied", 3)
    assert pid(scene) != first


async def test_a_model_that_cannot_load_leaves_the_old_one(scene: Scene) -> None:
    scene.model("broken", refuse="no such architecture")
    scene.write(ONE)
    scene.start()
    await scene.event("applied")
    old = pid(scene)
    scene.write("chat: {source: ./models/broken}\nnew: {source: ./models/chat}")
    failed = await scene.event("apply_failed")
    assert "no such architecture" in failed["error"]
    assert pid(scene) == old
    assert list(scene.live.deployments) == ["chat"]
    assert (await text(scene)).startswith("base ")


async def test_a_failed_first_pass_ends_the_runner_with_the_reason(scene: Scene) -> None:
    scene.model("broken", refuse="no such architecture")
    scene.write("chat: {source: ./models/broken}")
    result = await scene.start()
    assert "no such architecture" in str(result.error)


async def test_what_a_failed_first_pass_had_up_is_stopped_and_did_not_die(scene: Scene) -> None:
    scene.model("bad", waits_for=str(scene.folder / "go"), refuse="no such architecture")
    scene.write("chat: {source: ./models/chat}\nbad: {source: ./models/bad}")
    running = scene.start()
    await scene.until(
        lambda: [e for e in scene.events if e.get("target") == "models.chat" and e["event"] == "action_done"]
    )
    (scene.folder / "go").touch()
    result = await running
    assert "no such architecture" in str(result.error)
    assert not [e for e in scene.events if e["event"] in ("engine_died", "engine_backoff")]


async def test_a_killed_engine_fails_its_requests_and_comes_back(scene: Scene) -> None:
    scene.model("chat", token_seconds=0.05)
    scene.write(ONE)
    scene.start()
    await scene.event("applied")
    first = pid(scene)
    streaming = asyncio.create_task(ask(scene, max_tokens=1000))
    await in_flight(scene)
    os.kill(first, signal.SIGKILL)
    response = await asyncio.wait_for(streaming, 15)
    assert response.status_code == 500
    assert "engine died" in response.json()["error"]["message"]
    waiting = await text(scene)  # waits for the next engine
    assert waiting.startswith("base ")
    assert pid(scene) != first
    assert scene.live.deployments["chat"].restarts == 1


@pytest.mark.parametrize("load", ["eager", "on_demand"])
async def test_a_fault_of_ours_while_an_engine_is_brought_up_is_no_last_try(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, load: str
) -> None:
    scene.write(f"chat: {{source: ./models/chat, load: {load}}}")
    scene.start()
    await scene.event("applied")
    await text(scene)
    room = scene.live.room
    enter, faults = room.enter, [ZeroDivisionError("ours")]

    async def faulty(*what: object) -> object:
        if faults:
            raise faults.pop()
        return await enter(*what)

    monkeypatch.setattr(room, "enter", faulty)
    os.kill(pid(scene), signal.SIGKILL)
    async with asyncio.timeout(20):
        while (answer := await ask(scene)).status_code != 200:
            assert answer.status_code in (500, 503)
    assert not faults


async def test_an_edit_while_the_engine_is_down_is_there_when_it_is_back(scene: Scene) -> None:
    scene.model("chat", load_seconds=0.4)
    scene.write(ONE)
    scene.start()
    await scene.event("applied")
    os.kill(pid(scene), signal.SIGKILL)
    await scene.event("engine_died")
    scene.write("chat: {source: ./models/chat, adapters: {new: ./adapters/shout}}")
    await scene.event("applied", 2)
    await scene.event("engine_restarted")
    key = scene.live.deployments["chat"].spec.adapters[0].key
    assert (await text(scene, adapter_name="new")).startswith(key)


async def test_a_client_that_leaves_cancels_its_row(scene: Scene) -> None:
    scene.model("chat", token_seconds=0.05)
    scene.write(ONE)
    scene.start()
    await scene.event("applied")
    leaving = asyncio.create_task(ask(scene, max_tokens=1000))
    await in_flight(scene)
    leaving.cancel()
    connection = scene.live.deployments["chat"].engine.connection
    await asyncio.wait_for(connection.wait_idle(), 15)


async def test_a_listener_is_opened_and_closed_by_an_edit(scene: Scene) -> None:
    scene.write(ONE)
    scene.start()
    await scene.event("applied")
    scene.write(ONE, servers=f"more: {{port: {free_port()}}}")
    await scene.event("applied", 2)
    more = scene.port("more")
    async with httpx.AsyncClient() as client:
        assert (await client.get(f"http://127.0.0.1:{more}/ready")).status_code == 200
        scene.write(ONE)
        await scene.event("applied", 3)
        await scene.live.settle()
        with pytest.raises(httpx.ConnectError):
            await client.get(f"http://127.0.0.1:{more}/health")


async def test_a_listener_moves_to_another_port_and_to_another_address_on_it(scene: Scene) -> None:
    scene.write(ONE)
    scene.start()
    await scene.event("applied")
    engine, before = pid(scene), scene.lm
    scene.lm = f"lm: {{port: {free_port()}}}"
    scene.write(ONE)
    await scene.event("applied", 2)
    assert (await text(scene)).startswith("base ")
    scene.lm = scene.lm.replace("}", ", host: 127.0.0.2}")
    scene.write(ONE)
    await scene.event("applied", 3)
    async with httpx.AsyncClient() as client:
        assert (await client.get(f"http://127.0.0.2:{scene.port()}/ready")).status_code == 200
        with pytest.raises(httpx.ConnectError):
            await client.get(f"http://127.0.0.1:{scene.port()}/health")
    assert pid(scene) == engine
    assert before != scene.lm


async def test_a_port_that_is_taken_at_the_last_moment_leaves_everything(scene: Scene) -> None:
    scene.write(ONE)
    scene.start()
    await scene.event("applied")
    taken = free_port()
    with socket.create_server(("127.0.0.1", taken)):
        scene.write("chat: {source: ./models/chat}", servers=f"more: {{port: {taken}}}")
        failed = await scene.event("apply_failed")
        assert str(taken) in failed["error"]
        key = scene.live.deployments["chat"].spec.adapters[0].key
        assert (await text(scene, adapter_name="pirate")).startswith(key)
    await scene.event("applied", 2)  # it is tried again by itself
    assert (await ask(scene, adapter_name="pirate")).status_code == 404


async def test_a_fault_of_ours_in_a_pass_ends_nothing(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.write(ONE)
    scene.start()
    await scene.event("applied")

    def broken(*arguments: object) -> None:
        raise ZeroDivisionError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr("runner.control.intents.plan", broken)
        scene.write("chat: {source: ./models/chat}")
        failed = await scene.event("apply_failed")
    assert "unexpected ZeroDivisionError: a bug" in failed["error"]
    assert (await text(scene, adapter_name="pirate")) != ""
    scene.write("chat: {source: ./models/chat, aliases: [again]}")
    await scene.event("applied", 2)
    assert (await text(scene, model="again")).startswith("base ")


async def test_a_failed_plan_keeps_the_listener_that_it_was_to_move(scene: Scene) -> None:
    scene.model("broken", refuse="no such architecture")
    scene.write(ONE)
    scene.start()
    await scene.event("applied")
    before, old = scene.live.listeners["lm"], scene.lm
    scene.lm = f"lm: {{port: {free_port()}}}"
    scene.write("chat: {source: ./models/broken}")
    await scene.event("apply_failed")
    assert scene.live.listeners["lm"] is before
    assert (await text(scene, adapter_name="pirate")) != ""
    scene.lm = old
    scene.write(ONE)
    await scene.until(lambda: scene.events[-1]["event"] == "unchanged")


async def test_a_failed_hand_over_leaves_the_watch_where_it_was(scene: Scene) -> None:
    scene.write(ONE)
    scene.start()
    await scene.event("applied")
    other = scene.folder / "other" / "dev.yaml"
    other.parent.mkdir()
    other.write_text(scene.manifest.read_text())  # its relative paths lead nowhere from there
    assert scene.runner is not None
    result = await scene.runner._reconciler.apply((other,), Cause("apply", "me"))
    assert "there is no folder" in str(result.error)
    scene.write("chat: {source: ./models/chat, aliases: [again]}")
    await scene.event("applied", 2)
    assert (await text(scene, model="again")).startswith("base ")


async def test_a_download_that_fails_says_why(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(scene.folder / "hub"))
    scene.write(ONE)
    scene.start()
    await scene.event("applied")
    scene.write(f"{ONE}\nother: {{source: org/name}}")
    assert (await scene.event("downloading"))["repo"] == "org/name"
    failed = await scene.event("apply_failed")
    place = "dev.yaml:8:19: models.other.source: org/name (main) cannot be had: HF_HUB_OFFLINE says"
    assert place in failed["error"]
    assert "[E801]" in failed["error"]
    assert (await text(scene)).startswith("base ")


async def test_a_renamed_manifest_is_refused(scene: Scene) -> None:
    scene.write(ONE)
    scene.start()
    await scene.event("applied")
    scene.manifest.write_text(scene.manifest.read_text().replace("name: dev", "name: other"))
    failed = await scene.event("apply_failed")
    assert "dev.yaml:1:7: name: is 'other', but this runner was started as 'dev'" in failed["error"]


async def test_without_watching_an_edit_waits_for_the_next_apply(scene: Scene) -> None:
    scene.write(ONE)
    scene.start(watch=False)
    await scene.event("applied")
    assert scene.runner is not None
    assert scene.runner.status()["watching"] is False
    scene.write("chat: {source: ./models/chat, aliases: [new]}")
    await asyncio.sleep(1.5)
    assert len([e for e in scene.events if e["event"] == "applied"]) == 1
    result = await scene.runner._reconciler.apply((scene.manifest,), Cause("apply", "me"), watch=False)
    assert result.error is None
    assert (await text(scene, model="new")).startswith("base ")
    scene.write("chat: {source: ./models/chat, aliases: [newer]}")
    await scene.runner._reconciler.apply((scene.manifest,), Cause("apply", "me"))
    scene.write("chat: {source: ./models/chat, aliases: [newest]}")
    await scene.event("applied", 4)
    assert (await text(scene, model="newest")).startswith("base ")
