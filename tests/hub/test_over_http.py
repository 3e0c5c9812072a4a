"""What a server's clients get of the hub: searches of the admin API, over a real runner, and a hub on loopback."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from runner.cli.main import main
from tests.control.scene import Scene
from tests.hub.fake_hub import FakeHub
from tests.inspect.folders import write_llama


@pytest.fixture
async def scene(hub: FakeHub, tmp_path: Path) -> AsyncIterator[Scene]:
    """A runner with every API on one port, and `org/small` and `org/large` on the hub; the latter for members."""
    folder = write_llama(tmp_path / "made", num_hidden_layers=1)
    hub.repo("org/small", folder)
    hub.repo("org/large", folder).claimed["model.safetensors"] = 2**60
    scene = Scene(tmp_path)
    scene.model("chat")
    scene.lm = scene.lm.replace("}", ", apis: [openai, admin]}")
    (tmp_path / "hub.env").write_text("HF_TOKEN=hf_member\n")
    scene.write("chat: {source: ./models/chat}", top="env_file: hub.env")
    scene.start()
    await scene.event("applied")
    yield scene
    assert scene.runner is not None
    assert scene.running is not None
    scene.runner._stop.set()
    await scene.running
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().remove_signal_handler(number)


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
