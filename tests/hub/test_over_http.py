"""What a server's clients get of the hub: searches and Ollama's pull, over a real runner, and a hub on loopback."""

from __future__ import annotations

import asyncio
import fcntl
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import ollama
import pytest

from runner.cli.main import main
from runner.hub.cache import snapshot
from runner.hub.transfer import PARTIAL
from tests.control.scene import Scene, free_port
from tests.hub.fake_hub import FakeHub
from tests.inspect.folders import write_llama


@pytest.fixture
async def scene(hub: FakeHub, tmp_path: Path) -> AsyncIterator[Scene]:
    """A runner that serves one model, `closed` without the admin API, with `org/small` and `org/large` on the hub."""
    folder = write_llama(tmp_path / "made", num_hidden_layers=1)
    hub.repo("org/small", folder)
    hub.repo("org/large", folder).claimed["model.safetensors"] = 2**60
    scene = Scene(tmp_path)
    scene.model("chat")
    scene.lm = scene.lm.replace(
        "}", f", apis: [openai, ollama, admin]}}\n  closed: {{port: {free_port()}, apis: [ollama]}}"
    )
    (tmp_path / "hub.env").write_text("HF_TOKEN=hf_member\n")
    scene.write("chat: {source: ./models/chat}", top="env_file: hub.env")
    scene.start()
    await scene.event("applied")
    yield scene
    assert scene.runner is not None
    await scene.end()


async def get(scene: Scene, path: str) -> httpx.Response:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{scene.port()}", timeout=30) as client:
        return await client.get(path)


async def test_a_search_says_what_fits_and_what_is_here(scene: Scene, hub: FakeHub) -> None:
    assert await asyncio.to_thread(main, ["pull", "org/small"]) == 0
    answer = await get(scene, "/v1/models/search?q=org")
    found: dict[str, Any] = {one["repo"]: one for one in answer.json()["models"]}
    assert {repo: (one["fits"], one["here"]) for repo, one in found.items()} == {
        "org/small": (True, True),
        "org/large": (False, False),
    }
    commit = hub.repos["org/small"].branches["main"]
    size = len(hub.repos["org/small"].commits[commit]["model.safetensors"])
    assert (found["org/small"]["commit"], found["org/small"]["weights_bytes"]) == (commit, size)
    assert [asked.token for asked in hub.asked if asked.path == "/api/models"] == ["hf_member"]
    assert (await get(scene, "/v1/models/search?q=org&limit=1")).json()["models"] == [found["org/small"]]
    assert (await get(scene, "/v1/models/search?q=nothing-of-the-kind")).json() == {"models": []}


async def test_without_an_answer_of_the_hub(scene: Scene, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.fault("/api/models", times=1, status=401)
    refused = await get(scene, "/v1/models/search?q=org")
    assert (refused.status_code, refused.json()["error"]["code"]) == (502, "E802")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("runner.control.admin.SEARCH_TIMEOUT", 2.0)
    gone = await get(scene, "/v1/models/search?q=org")
    assert (gone.status_code, gone.json()["error"]["code"]) == (502, "E804")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    offline = await get(scene, "/v1/models/search?q=org")
    assert (offline.status_code, offline.json()["error"]["code"]) == (503, "E801")


def of_ollama(scene: Scene, server: str = "lm") -> ollama.AsyncClient:
    return ollama.AsyncClient(host=f"http://127.0.0.1:{scene.port(server)}")


async def names(client: ollama.AsyncClient) -> list[str | None]:
    return [model.model for model in (await client.list()).models]


async def whole(client: ollama.AsyncClient, name: str) -> list[ollama.ProgressResponse]:
    """Every step of a pull."""
    return [step async for step in await client.pull(name, stream=True)]


async def test_ollamas_client_pulls_with_progress_and_lists_what_came(scene: Scene, hub: FakeHub, cache: Path) -> None:
    client = of_ollama(scene)
    assert await names(client) == ["chat"]
    hub.fault("model.safetensors", cut_after=100)
    steps = await whole(client, "hf.co/org/small:latest")
    commit = hub.repos["org/small"].branches["main"]
    assert [step.status for step in steps[:1]] == ["pulling manifest"]
    sizes = [(step.completed, step.total) for step in steps if step.digest == f"sha1:{commit}"]
    held = snapshot(cache, "org/small", "main")
    assert held is not None
    total = sum(path.stat().st_size for path in held.iterdir())
    assert sizes[-1] == (total, total)
    assert {of for _, of in sizes} == {total}
    assert [step.status for step in steps[-2:]] == [
        "org/small is in the hub's cache; an entry of the manifest serves it",
        "success",
    ]
    assert [asked.token for asked in hub.fetched("config.json")] == ["hf_member"]
    assert await names(client) == ["chat", "org/small"]
    listed = (await client.list()).models[1]
    assert (listed.digest, listed.size, listed.details and listed.details.family) == (commit, total, "llama")
    assert await names(of_ollama(scene, "closed")) == ["chat"], "who may not pull sees what is served"
    assert (await client.pull("org/small", stream=False)).status == "success"
    assert "downloaded" in [event["event"] for event in scene.events]


async def test_what_the_manifest_could_not_have_is_pulled_as_it_asks_for_it(
    scene: Scene, hub: FakeHub, cache: Path
) -> None:
    repo = hub.repo("org/late", scene.folder / "models" / "chat")
    first = repo.branches["main"]
    repo.push({**repo.commits[first], "own.py": b"", "generation_config.json": b"{}"}, branch="v2")
    hub.fault("models/org/late", times=1, status=404, headers={"X-Error-Code": "RepoNotFound"})
    both = "chat: {source: ./models/chat}\nlate: {source: org/late, revision: v2, trust_remote_code: true}"
    scene.write(both, top="env_file: hub.env")
    await scene.event("apply_failed")
    client = of_ollama(scene)
    assert (await whole(client, "org/late"))[-1].status == "success"
    held = snapshot(cache, "org/late", "v2")
    assert held is not None
    assert (held / "own.py").exists(), "with the code that it may run"
    assert snapshot(cache, "org/late", "main") is None
    scene.write(both.replace("late: {", "late: {aliases: [later], "), top="env_file: hub.env")
    await scene.event("applied", 2)
    assert await names(client) == ["chat", "late", "later"]


async def test_what_cannot_be_pulled_says_so(scene: Scene, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refused(name: str, server: str = "lm") -> tuple[int, str]:
        with pytest.raises(ollama.ResponseError) as caught:
            await whole(of_ollama(scene, server), name)
        return caught.value.status_code, caught.value.error

    status, error = await refused("org/small", "closed")
    assert status == 403
    assert "give it the admin API (apis: [ollama, admin]), or run `mlx-run pull org/small`" in error
    assert (await refused("llama3.2"))[0] == 404
    assert [asked.path for asked in hub.asked] == []
    status, error = await refused("org/none")
    assert status == 404
    assert "the hub has no such repository" in error
    assert (await refused("org/small:v9"))[0] == 404
    hub.repos["org/small"].claimed["model.safetensors"] = 2**60
    status, error = await refused("org/small")
    assert status == 422
    assert "has room for" in error
    del hub.repos["org/small"].claimed["model.safetensors"]
    hub.fault("model.safetensors", times=9, corrupt=True)
    assert "is not what the hub lists, twice" in (await refused("org/small"))[1]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    status, error = await refused("org/small")
    assert status == 503
    assert "HF_HUB_OFFLINE" in error


async def test_a_client_that_leaves_ends_the_download(scene: Scene, hub: FakeHub, cache: Path) -> None:
    hold = threading.Event()
    hub.fault("model.safetensors", hold=hold)
    stream = await of_ollama(scene).pull("org/small", stream=True)
    async for step in stream:
        if step.digest:
            break
    while not hub.fetched("model.safetensors"):
        await asyncio.sleep(0.01)
    await stream.aclose()
    fetching = cache / ".locks" / "models--org--small" / "mlx-run.lock"
    assert fetching.exists()
    async with asyncio.timeout(15):
        while await asyncio.to_thread(_is_held, fetching):
            await asyncio.sleep(0.01)
    hold.set()
    assert snapshot(cache, "org/small", "main") is None
    assert list((cache / "models--org--small" / "blobs").glob(f"*{PARTIAL}"))


def _is_held(path: Path) -> bool:
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
