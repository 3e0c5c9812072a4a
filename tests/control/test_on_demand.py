"""Models that are loaded when somebody asks for them, and go when nobody does or others need the room."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from runner.control.model_status import status_of
from runner.plan.forecast import ENGINE_BYTES
from tests.control.asking import ask, in_flight, pid, text
from tests.control.scene import Scene

LAZY = "load: on_demand"
MIB = 2**20
FOUR = "base " * 4


def lazy(*names: str, more: str = "") -> str:
    return "\n".join(f"{name}: {{source: ./models/{name}, {LAZY}{more}}}" for name in names)


def limit(models: int, mib: int) -> str:
    """Room for so many engines of so many MiB."""
    return f"memory: {{limit: {models * (ENGINE_BYTES + (mib + 8) * MIB)}}}"


async def up(scene: Scene) -> None:
    scene.start()
    await scene.event("applied")


def state(scene: Scene, name: str = "chat") -> dict[str, Any]:
    status: dict[str, Any] = status_of(scene.live.deployments[name])
    return status


def loads(scene: Scene, name: str) -> int:
    return len([e for e in scene.events if e["event"] == "loaded" and e["target"] == f"models.{name}"])


async def loaded_models(scene: Scene) -> dict[str, bool]:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{scene.port()}", timeout=15) as client:
        return {card["id"]: card["loaded"] for card in (await client.get("/v1/models")).json()["data"]}


async def test_not_loaded_is_as_it_should_be(scene: Scene) -> None:
    scene.write(lazy("chat"))
    await up(scene)
    assert state(scene)["state"] == "idle"
    assert scene.live.deployments["chat"].ready
    conditions = scene.live.model_statuses()[0]["conditions"]
    assert (conditions["Loaded"]["status"], conditions["Loaded"]["reason"]) == ("false", "Idle")
    assert (conditions["Ready"]["status"], conditions["Ready"]["reason"]) == ("true", "LoadsOnDemand")
    assert await loaded_models(scene) == {"chat": False}
    (action,) = [
        a for e in scene.events if e["event"] == "planned" for a in e["plan"]["actions"] if a["action"] == "start"
    ]
    assert (action["reason"], action["memory_delta_bytes"]) == ("loads at its first request", 0)


async def test_the_first_requests_load_it_once(scene: Scene) -> None:
    scene.model("chat", load_seconds=0.2)
    scene.write(lazy("chat"))
    await up(scene)
    assert await asyncio.gather(*(text(scene, max_tokens=4) for _ in range(5))) == [FOUR] * 5
    assert loads(scene, "chat") == 1
    assert await loaded_models(scene) == {"chat": True}
    assert scene.live.model_statuses()[0]["conditions"]["Loaded"]["status"] == "true"


async def test_idle_for_long_it_goes_and_its_process_with_it(scene: Scene) -> None:
    scene.write(lazy("chat", more=", idle_timeout: 1s"))
    await up(scene)
    await text(scene)
    engine = scene.live.deployments["chat"].engine
    await scene.event("unloaded")
    async with asyncio.timeout(20):
        await engine.gone()
    assert state(scene)["state"] == "idle"
    await text(scene)
    assert loads(scene, "chat") == 2


async def test_an_eager_one_with_a_timeout_comes_back_too(scene: Scene) -> None:
    scene.write("chat: {source: ./models/chat, idle_timeout: 1s}")
    await up(scene)
    first = pid(scene)
    await scene.event("unloaded")
    await text(scene)
    assert pid(scene) != first


async def test_a_running_request_is_no_idleness(scene: Scene) -> None:
    scene.model("chat", token_seconds=0.15)
    scene.write(lazy("chat", more=", idle_timeout: 1s"))
    await up(scene)
    assert await text(scene, max_tokens=12) == "base " * 12
    assert not [e for e in scene.events if e["event"] == "unloaded"]


async def test_a_load_that_fails_answers_with_the_reason(scene: Scene) -> None:
    scene.model("chat", load_seconds=0.1, refuse="no such layer")
    scene.write(lazy("chat"))
    await up(scene)
    answers = await asyncio.gather(*(ask(scene) for _ in range(3)))
    assert {answer.status_code for answer in answers} == {500}
    assert all("cannot be loaded: chat: no such layer" in answer.json()["error"]["message"] for answer in answers)
    assert state(scene)["state"] == "idle"
    assert "no such layer" in state(scene)["last_error"]
    conditions = scene.live.model_statuses()[0]["conditions"]
    assert conditions["Ready"]["status"] == "false"
    assert not scene.live.deployments["chat"].ready


async def test_one_that_dies_is_loaded_by_the_next_request(scene: Scene) -> None:
    scene.model("chat", die_after=6)
    scene.write(lazy("chat"))
    await up(scene)
    assert await text(scene, max_tokens=4) == FOUR
    assert (await ask(scene, max_tokens=4)).status_code == 500
    assert await text(scene, max_tokens=4) == FOUR
    assert loads(scene, "chat") == 2


async def test_the_least_missed_gives_way(scene: Scene) -> None:
    for name in ("a", "b", "c"):
        scene.model(name, mib=50)
    scene.write(lazy("a", "b", "c"), top=limit(2, 50))
    await up(scene)
    for name in ("a", "b", "a", "c"):
        await text(scene, model=name)
    assert await loaded_models(scene) == {"a": True, "b": False, "c": True}
    assert [e["target"] for e in scene.events if e["event"] == "evicted"] == ["models.b"]


async def test_a_lower_priority_gives_way_first(scene: Scene) -> None:
    for name in ("a", "b", "c"):
        scene.model(name, mib=50)
    models = lazy("a", more=", priority: -1") + "\n" + lazy("b", "c")
    scene.write(models, top=limit(2, 50))
    await up(scene)
    for name in ("b", "a", "c"):
        await text(scene, model=name)
    assert await loaded_models(scene) == {"a": False, "b": True, "c": True}


async def test_one_that_is_loaded_from_the_start_never_gives_way(scene: Scene) -> None:
    for name in ("a", "b", "c"):
        scene.model(name, mib=50)
    scene.write("a: {source: ./models/a}\n" + lazy("b", "c"), top=limit(2, 50))
    await up(scene)
    stays = pid(scene, "a")
    for name in ("b", "c", "b"):
        await text(scene, model=name)
    assert pid(scene, "a") == stays
    assert len([e for e in scene.events if e["event"] == "evicted"]) == 2


async def test_what_works_is_not_ended(scene: Scene) -> None:
    scene.model("a", mib=50, token_seconds=0.1)
    scene.model("b", mib=50)
    scene.write(lazy("a", "b"), top=limit(1, 50))
    await up(scene)
    long = asyncio.create_task(text(scene, model="a", max_tokens=25))
    async with asyncio.timeout(10):
        while not scene.live.deployments["a"].loaded:
            await asyncio.sleep(0.01)
    await in_flight(scene, "a")
    assert await text(scene, model="b", max_tokens=4) == FOUR
    assert await long == "base " * 25, "it came to its end first"


async def test_nobody_gives_way_in_time(scene: Scene) -> None:
    scene.model("a", mib=50, token_seconds=0.1)
    scene.model("b", mib=50)
    scene.write(lazy("a", "b"), top=limit(1, 50))
    scene.start(load_wait=1.5)
    await scene.event("applied")
    long = asyncio.create_task(text(scene, model="a", max_tokens=100_000))
    async with asyncio.timeout(10):
        while not scene.live.deployments["a"].loaded:
            await asyncio.sleep(0.01)
    await in_flight(scene, "a")
    answer = await ask(scene, model="b")
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1
    assert not long.done(), "what works is not ended"
    long.cancel()
    with pytest.raises(asyncio.CancelledError):
        await long


async def test_what_can_never_fit_says_so_at_once(scene: Scene) -> None:
    scene.model("a", mib=50)
    scene.model("b", mib=50)
    scene.write("a: {source: ./models/a}\n" + lazy("b"), top=limit(2, 50))
    await up(scene)
    scene.live.room.limit = ENGINE_BYTES + 120 * MIB  # a manifest that says so is refused (E703)
    answer = await ask(scene, model="b")
    assert answer.status_code == 503
    assert "no room for b" in answer.json()["error"]["message"]
    assert await text(scene, model="a")


async def test_what_the_machine_lacks_now_is_said_of_one_that_is_planned(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runner.control.room.available_memory", lambda: 10 * MIB)
    scene.model("a", mib=50)
    scene.write("a: {source: ./models/a}")
    scene.start()
    said = await scene.event("memory_short")
    assert (said["target"], said["available"]) == ("models.a", 10 * MIB)
    assert said["needed"] >= ENGINE_BYTES + 50 * MIB
    await scene.event("applied")
    assert await text(scene, model="a")


async def test_an_edit_of_a_loaded_one_serves_the_new_one_at_the_next_request(scene: Scene) -> None:
    scene.model("other")
    scene.write(lazy("chat"))
    await up(scene)
    await text(scene)
    first = scene.live.deployments["chat"].engine
    scene.write(f"chat: {{source: ./models/other, {LAZY}}}")
    await scene.event("applied", 2)
    await first.gone()
    assert state(scene)["state"] == "idle"
    await text(scene)
    assert state(scene)["source"] == "./models/other"


@pytest.mark.parametrize("used", [False, True])
async def test_from_on_demand_to_eager_and_back_in_place(scene: Scene, used: bool) -> None:
    scene.write(lazy("chat"))
    await up(scene)
    if used:
        await text(scene)
    scene.write("chat: {source: ./models/chat}")
    await scene.event("applied", 2)
    engine = pid(scene)
    scene.write(lazy("chat"))
    await scene.event("applied", 3)
    assert pid(scene) == engine


async def test_a_model_that_goes_while_it_is_loading(scene: Scene) -> None:
    scene.model("slow", load_seconds=20)
    scene.write(lazy("chat", "slow"))
    await up(scene)
    waiting = asyncio.create_task(ask(scene, model="slow"))
    await scene.event("loading")
    scene.write(lazy("chat"))
    await scene.event("applied", 2)
    assert (await waiting).status_code == 404


async def _stream(scene: Scene, path: str, body: dict[str, Any]) -> tuple[int, str]:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{scene.port()}", timeout=15) as client:
        answer = await client.post(path, json={"model": "chat", "stream": True, "max_tokens": 4, **body})
        return answer.status_code, answer.text


_MESSAGES = {"messages": [{"role": "user", "content": "hi"}]}
STREAMS: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/completions", {"prompt": "hi"}, "data: [DONE]"),
    ("/v1/chat/completions", _MESSAGES, "data: [DONE]"),
    ("/v1/messages", _MESSAGES, "event: message_stop"),
]


@pytest.mark.parametrize(("path", "body", "end"), STREAMS)
async def test_a_stream_is_kept_open_while_it_loads(
    path: str, body: dict[str, Any], end: str, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runner.gateway.waiting.BEFORE", 0.05)
    monkeypatch.setattr("runner.gateway.waiting.EVERY", 0.05)
    scene.model("chat", load_seconds=0.4)
    scene.lm = scene.lm.replace("}", ", apis: [openai, anthropic]}")
    scene.write(lazy("chat"))
    await up(scene)
    status, told = await _stream(scene, path, body)
    assert status == 200
    assert told.startswith(": loading\n\n: loading\n\n")
    assert told.rstrip().endswith(end) or end in told
    assert "base" in told
    _, again = await _stream(scene, path, body)
    assert ": loading" not in again


async def test_a_stream_that_waited_in_vain_ends_with_the_reason(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.gateway.waiting.BEFORE", 0.05)
    scene.model("chat", load_seconds=0.4, refuse="no such layer")
    scene.write(lazy("chat"))
    await up(scene)
    status, told = await _stream(scene, "/v1/completions", {"prompt": "hi"})
    assert status == 200
    assert told.startswith(": loading\n\n")
    assert "no such layer" in told
    assert "[DONE]" not in told


async def test_who_leaves_while_it_loads_is_let_go(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.gateway.waiting.BEFORE", 0.05)
    scene.model("chat", load_seconds=1.0)
    scene.write(lazy("chat"))
    await up(scene)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{scene.port()}", timeout=15) as client:
        body = {"model": "chat", "prompt": "hi", "stream": True}
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            assert await anext(answer.aiter_lines()) == ": loading"
    async with asyncio.timeout(20):
        while scene.live.deployments["chat"].busy:
            await asyncio.sleep(0.01)
    await scene.event("loaded")
    assert scene.live.deployments["chat"].engine.connection.in_flight == 0
