"""Who notices a switch: nobody whom the plan called undisturbed, and the others for no longer than it said."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest

from tests.control.asking import ONE, ask, in_flight, pid, text
from tests.control.scene import Scene, free_port

LIMIT = "memory: {limit: 1500MiB}"


def big(source: str) -> str:
    return f"chat: {{source: ./models/{source}, kv_cache: {{prefix_cache: 0}}}}"


@asynccontextmanager
async def clients(url: str, body: dict[str, object], count: int = 8) -> AsyncIterator[list[httpx.Response]]:
    """So many clients that ask one thing after the other on connections they keep; what they got, in order."""
    got: list[httpx.Response] = []
    stop = asyncio.Event()

    async def one() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:
            while not stop.is_set():
                got.append(await client.post("/v1/completions", json={"prompt": "hi", **body}))

    async with asyncio.TaskGroup() as group:
        for _ in range(count):
            group.create_task(one())
        yield got
        stop.set()


async def more(got: list[httpx.Response], count: int = 20) -> None:
    """Returns once so many more answers have come. Raises TimeoutError."""
    until = len(got) + count
    async with asyncio.timeout(15):
        while len(got) < until:
            await asyncio.sleep(0.01)


def url(scene: Scene) -> str:
    return f"http://127.0.0.1:{scene.port()}"


async def test_surges_renames_and_updates_under_load_fail_nothing(scene: Scene) -> None:
    scene.model("chat", token_seconds=0.002)
    scene.model("other", token_seconds=0.002, load_seconds=0.1)
    scene.write(f"{ONE.replace('}}', '}, aliases: [x]}')}")
    scene.start()
    await scene.event("applied")
    edits = [
        "chat: {source: ./models/other, aliases: [x]}",
        "talk: {source: ./models/other, aliases: [x], adapters: {pirate: ./adapters/pirate}}",
        "talk: {source: ./models/other, aliases: [x], batching: {max_rows: 4}, generation: {temperature: 0.5}}",
        "chat: {source: ./models/chat, aliases: [x]}\ntalk: {source: ./models/other}",
        "talk: {source: ./models/other, aliases: [x]}\nnew: {source: ./models/chat}",
    ]
    async with clients(url(scene), {"model": "x", "max_tokens": 8}) as got:
        await more(got)
        for number, models in enumerate(edits):
            scene.write(models)
            await scene.event("applied", 2 + number)
            await more(got)
    disruptions = {a["disruption"] for e in scene.events if e["event"] == "planned" for a in e["plan"]["actions"]}
    assert "drain then start" not in disruptions
    assert {response.status_code for response in got} == {200}
    assert {len(response.json()["choices"][0]["text"].split()) for response in got} == {8}, "none was cut short"


async def test_a_drain_holds_requests_until_the_next_engine_is_there(scene: Scene) -> None:
    scene.model("one", mib=1000, token_seconds=0.002)
    scene.model("two", mib=1000, load_seconds=0.3)
    scene.write(big("one"), top=LIMIT)
    scene.start(load_wait=20.0)
    await scene.event("applied")
    old = pid(scene)
    async with clients(url(scene), {"max_tokens": 8}) as got:
        await more(got)
        scene.write(big("two"), top=LIMIT)
        (action,) = (await scene.event("planned", 2))["plan"]["actions"]
        assert (action["disruption"], action["wait"]) == (
            "drain then start", {"drain_seconds": 5, "hold_seconds": 20.0},
        )  # fmt: skip
        await scene.event("applied", 2)
        await more(got)
    assert pid(scene) != old
    assert {response.status_code for response in got} == {200}


async def test_a_request_that_is_held_too_long_is_told_when_to_come_back(scene: Scene) -> None:
    scene.model("one", mib=1000)
    scene.model("two", mib=1000, waits_for=str(scene.folder / "go"))
    scene.write(big("one"), top=LIMIT)
    scene.start(load_wait=0.1)
    await scene.event("applied")
    scene.write(big("two"), top=LIMIT)
    await scene.until(lambda: scene.live.deployments["chat"].state == "loading")
    late = await ask(scene)
    (scene.folder / "go").touch()
    assert late.status_code == 503
    assert int(late.headers["retry-after"]) > 0
    assert late.json()["error"]["code"] == "model_loading"
    await scene.event("applied", 2)
    assert (await text(scene)).startswith("base ")


async def test_a_request_that_outlasts_the_drain_is_cut_and_may_be_sent_again(scene: Scene) -> None:
    scene.model("one", mib=1000, token_seconds=0.05)
    scene.model("two", mib=1000)
    scene.write(big("one"), top=LIMIT)
    scene.start(drain_timeout=0.2)
    await scene.event("applied")
    slow = asyncio.create_task(ask(scene, max_tokens=1000))
    await in_flight(scene)
    scene.write(big("two"), top=LIMIT)
    cut = await slow
    assert cut.status_code == 503
    assert cut.json()["error"]["code"] == "drain_deadline"
    assert "retry-after" in cut.headers
    await scene.event("applied", 2)
    assert (await text(scene)).startswith("base ")


async def test_a_port_that_moves_opens_before_the_old_one_closes(scene: Scene) -> None:
    scene.model("chat", token_seconds=0.02)
    scene.write(ONE)
    scene.start()
    await scene.event("applied")
    old, engine = url(scene), pid(scene)
    async with httpx.AsyncClient(timeout=15) as client:
        streaming = asyncio.create_task(client.post(f"{old}/v1/completions", json={"prompt": "hi", "max_tokens": 50}))
        await in_flight(scene)
        scene.lm = f"lm: {{port: {free_port()}}}"
        scene.write(ONE)
        await scene.event("applied", 2)
        assert not streaming.done()
        assert (await text(scene)).startswith("base "), "the new port serves while the old one drains"
        with pytest.raises(httpx.ConnectError):
            await client.get(f"{old}/health")
        assert len((await streaming).json()["choices"][0]["text"].split()) == 50
    assert pid(scene) == engine


async def test_another_address_of_the_same_port_is_open_while_the_old_one_drains(scene: Scene) -> None:
    scene.model("chat", token_seconds=0.02)
    scene.write(ONE)
    scene.start()
    await scene.event("applied")
    old, port = url(scene), scene.port()
    async with httpx.AsyncClient(timeout=15) as client:
        streaming = asyncio.create_task(client.post(f"{old}/v1/completions", json={"prompt": "hi", "max_tokens": 100}))
        await in_flight(scene)
        # Half a request keeps its server from ending by itself, so that its connections are severed in the end.
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /health HT")
        await writer.drain()
        scene.lm = scene.lm.replace("}", ", host: 127.0.0.2}")
        scene.write(ONE)
        await scene.event("applied", 2)
        assert not streaming.done()
        new = f"http://127.0.0.2:{port}"
        async with clients(new, {"max_tokens": 2}, count=2) as got:
            await more(got, 5)
            with pytest.raises(httpx.ConnectError):
                await client.get(f"{old}/health")
            assert len((await streaming).json()["choices"][0]["text"].split()) == 100
            await scene.live.settle()
            await more(got, 5)
        assert {response.status_code for response in got} == {200}, "what the old one severs is its own"
        assert await reader.read() == b""
        writer.close()


async def test_keys_and_origins_change_on_connections_that_stay_open(scene: Scene) -> None:
    scene.write(ONE)
    scene.start()
    await scene.event("applied")
    async with httpx.AsyncClient(base_url=url(scene)) as client:
        assert (await client.get("/v1/models")).status_code == 200
        scene.lm = scene.lm.replace("}", ", auth: {api_keys: [sk-1]}}")
        scene.write(ONE)
        await scene.event("applied", 2)
        assert (await client.get("/v1/models")).status_code == 401
        keyed = await client.get("/v1/models", headers={"authorization": "Bearer sk-1"})
        assert keyed.status_code == 200
    assert "sk-1" not in str(scene.events)
