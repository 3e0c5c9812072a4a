"""Memory under load, with real engines: more models than there is room for, and models that come and go."""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from runner.machine import resident_bytes
from runner.plan.forecast import ENGINE_BYTES, least
from tests.control.scene import Scene
from tests.engine.tiny import build_model

pytestmark = [pytest.mark.mlx, pytest.mark.story]

LARGER = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 8}
LARGER |= {"num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 512}
MODELS = [f"m{number}" for number in range(10)]


class Sampler(threading.Thread):
    """The resident memory of all engines together, ten times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = 0
        self.samples = 0
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(0.1):
            self.most = max(self.most, sum(resident_bytes(pid) for pid in engines()))
            self.samples += 1

    def end(self) -> None:
        self._ended.set()
        self.join()


def engines() -> list[int]:
    """Engines of this process."""
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            if "runner.engine" in child.cmdline() and child.status() != psutil.STATUS_ZOMBIE:
                found.append(child.pid)
        except psutil.NoSuchProcess:
            continue
    return found


def manifest(scene: Scene, names: list[str], limit: int, rows: int = 4) -> None:
    batching = f"batching: {{max_rows: {rows}, prefill_step_size: 128}}, kv_cache: {{prefix_cache: 4MiB}}"
    models = "\n".join(f"{name}: {{source: ./models/{name}, load: on_demand, {batching}}}" for name in names)
    scene.write(models, top=f"memory: {{limit: {limit}}}")


async def traffic(scene: Scene, seconds: float, clients: int, seed: int) -> tuple[Counter[str], list[float]]:
    """What became of random requests to random models, and how long each took."""
    ended: Counter[str] = Counter()
    took: list[float] = []
    until = time.monotonic() + seconds

    async def client(number: int) -> None:
        chosen = random.Random(seed + number)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{scene.port()}", timeout=120) as http:
            while time.monotonic() < until:
                body: dict[str, Any] = {"model": chosen.choice(MODELS), "max_tokens": chosen.randint(1, 40)}
                body["prompt"] = [chosen.randint(5, 300) for _ in range(chosen.randint(2, 200))]
                began = time.monotonic()
                answer = await http.post("/v1/completions", json=body)
                took.append(time.monotonic() - began)
                code = "" if answer.status_code == 200 else f" {answer.json()['error']['code']}"
                ended[f"{answer.status_code}{code}"] += 1
                await asyncio.sleep(chosen.random() * 0.2)

    await asyncio.gather(*(client(number) for number in range(clients)))
    return ended, took


async def ten_models(scene: Scene, seconds: float, clients: int) -> dict[str, Any]:
    """Ten models whose sum is five times the limit, under random traffic. What there is to say of it."""
    for number, name in enumerate(MODELS):
        build_model(scene.folder / "models" / name, seed=number, config=LARGER)
    manifest(scene, MODELS, 1 << 40)
    scene.start(engine_command="")
    await scene.event("applied")
    one = least(scene.live.deployments["m0"].spec) + ENGINE_BYTES
    limit = 2 * one
    manifest(scene, MODELS, limit)
    async with asyncio.timeout(10):
        while scene.live.room.limit != limit:
            await asyncio.sleep(0.05)
    sampler = Sampler()
    sampler.start()
    began = time.monotonic()
    ended, took = await traffic(scene, seconds, clients, seed=3)
    sampler.end()
    loads = len([event for event in scene.events if event["event"] == "loaded"])
    return {
        "limit": limit,
        "sum": 10 * one,
        "most": sampler.most,
        "samples": sampler.samples,
        "loads": loads,
        "seconds": round(time.monotonic() - began, 1),
        "ended": dict(ended),
        "slowest": round(max(took), 2),
        "died": len([event for event in scene.events if event["event"] in ("engine_died", "engine_over_memory")]),
        "load_failed": [event["error"] for event in scene.events if event["event"] == "load_failed"][:3],
    }


def judge(found: dict[str, Any]) -> None:
    print(found)
    assert found["most"] <= found["limit"], found
    assert set(found["ended"]) <= {"200", "503 model_loading", "503 no_memory"}, found
    assert found["died"] == 0, found
    served = found["ended"]["200"]
    assert found["loads"] < served, found


async def test_more_models_than_there_is_room_for(scene: Scene) -> None:
    judge(await ten_models(scene, 5.0, clients=4))


@pytest.mark.nightly
@pytest.mark.timeout(900)
async def test_more_models_than_there_is_room_for_ten_minutes(scene: Scene) -> None:
    seconds = float(os.environ.get("MLX_RUN_TEST_SECONDS", "600"))
    found = await ten_models(scene, seconds, clients=16)
    judge(found)
    assert found["loads"] < found["ended"]["200"] / 2, "requests share loads: without that four in five would need one"


def _files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def load_and_unload(scene: Scene, times: int) -> tuple[int, int]:
    """Growth of this process, the runner's, in bytes, and of its open files, from the first fifth on."""
    build_model(scene.folder / "models" / "m0")
    manifest(scene, ["m0"], 1 << 30)
    scene.start(engine_command="")
    await scene.event("applied")
    before = files = 0
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{scene.port()}", timeout=30) as http:
        for number in range(times):
            answer = await http.post("/v1/completions", json={"model": "m0", "prompt": "hello", "max_tokens": 3})
            assert answer.status_code == 200, answer.text
            engine = scene.live.deployments["m0"].engine
            scene.live.deployments["m0"].unload("the test says so")
            await engine.gone()
            if number == times // 5:
                before, files = resident_bytes(os.getpid()), _files()
    async with asyncio.timeout(20):
        while engines():
            await asyncio.sleep(0.05)
    return resident_bytes(os.getpid()) - before, _files() - files


async def test_nothing_is_left_of_models_that_come_and_go(scene: Scene) -> None:
    _, files = await load_and_unload(scene, 5)
    assert files <= 0


@pytest.mark.nightly
@pytest.mark.timeout(300)
async def test_nothing_is_left_of_models_that_come_and_go_fifty_times(scene: Scene) -> None:
    grown, files = await load_and_unload(scene, 50)
    print(grown, files)
    assert grown < 2 * 2**20
    assert files <= 0
