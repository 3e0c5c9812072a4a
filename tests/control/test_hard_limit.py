"""A real kernel ends an engine at its control group's limit. Skipped, with the reason, where no groups can be had."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from runner.control.backstop import hard_limit
from runner.control.cgroup import NoGroup, ground, prepare
from runner.machine import cpu_backend
from tests.control.asking import ask
from tests.control.scene import Scene
from tests.control.test_adoption import killed_runner
from tests.engine.tiny import build_model

MIB = 2**20


HARD = 214 * MIB
"""Of an engine that may use 100 MiB, with 64 MiB beside it in place of 512: less to fill."""


@pytest.fixture(autouse=True)
def groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the runner would find, too."""
    try:
        prepare(ground())
    except NoGroup as error:
        pytest.skip(str(error))
    if not cpu_backend():
        pytest.skip("control groups do not count a GPU's memory")
    monkeypatch.setattr("runner.control.backstop._BESIDE", 64 * MIB)


def group_of(pid: int) -> Path:
    """Where a process is."""
    (path,) = (line[3:] for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines() if line.startswith("0::"))
    found = ground().base
    assert path.endswith(f"/{Path(path).name}")
    return found / Path(path).name


def eater(scene: Scene, mib: int) -> None:
    """A model whose engine takes so much at its sixth token."""
    scene.model("chat", eats_after=6, eats_mib=mib)
    scene.write("chat: {source: ./models/chat, memory_limit: 100MiB}")


async def test_an_engine_that_takes_too_much_is_ended_and_nothing_else(scene: Scene) -> None:
    eater(scene, 300)
    scene.start()
    assert (await scene.event("memory_backstop"))["kind"] == "cgroup"
    await scene.event("applied")
    (status,) = scene.live.model_statuses()
    assert status["hard_limit_bytes"] == hard_limit(100 * MIB) == HARD
    group = group_of(status["pid"])
    assert group.name.startswith("mlx-run-")
    assert [(await ask(scene, max_tokens=4)).status_code for _ in range(2)] == [200, 500]
    found = await scene.event("engine_out_of_memory")
    assert f"it reached {HARD:,} bytes" in found["reason"]
    await scene.event("engine_restarted")
    assert (await ask(scene, max_tokens=4)).status_code == 200
    assert not group.exists()


async def test_below_the_limit_nothing_happens(scene: Scene) -> None:
    eater(scene, 100)
    scene.start()
    await scene.event("applied")
    assert [(await ask(scene, max_tokens=4)).status_code for _ in range(3)] == [200, 200, 200]
    assert scene.live.model_statuses()[0]["restarts"] == 0


async def test_without_a_limit_it_may_take_what_there_is(scene: Scene) -> None:
    scene.model("chat", eats_after=2, eats_mib=300)
    scene.write("chat: {source: ./models/chat}")
    scene.start()
    await scene.event("applied")
    assert (await ask(scene, max_tokens=4)).status_code == 200
    assert scene.live.model_statuses()[0]["hard_limit_bytes"] == 0


async def test_an_adopted_engine_stays_bounded(scene: Scene) -> None:
    eater(scene, 300)
    engine = await killed_runner(scene)
    group = group_of(engine)
    scene.start()
    await scene.event("engine_adopted")
    await scene.until(lambda: any(e["event"] in ("applied", "unchanged") for e in scene.events))
    assert (await ask(scene, max_tokens=4)).status_code == 200
    await scene.until(lambda: scene.live.model_statuses()[0]["hard_limit_bytes"] == HARD)
    assert scene.live.model_statuses()[0]["pid"] == engine
    assert (await ask(scene, max_tokens=4)).status_code == 500
    found = await scene.event("engine_out_of_memory")
    assert f"it reached {HARD:,} bytes" in found["reason"]
    await scene.event("engine_restarted")
    await stopped(scene)
    assert not group.exists()


async def test_no_group_is_left(scene: Scene) -> None:
    eater(scene, 1)
    before = set(ground().base.iterdir())
    engine = await killed_runner(scene)
    os.kill(engine, signal.SIGKILL)  # with nobody there who could remove its group
    scene.start()
    await scene.event("applied")
    assert len(set(ground().base.iterdir()) - before) == 1
    await stopped(scene)
    assert set(ground().base.iterdir()) == before


async def stopped(scene: Scene) -> None:
    """The runner has ended."""
    assert scene.runner is not None
    assert scene.running is not None
    scene.runner._stop.set()
    await scene.running


@pytest.mark.mlx
async def test_a_real_engine_that_cannot_be_loaded_within_it(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.control.backstop._BESIDE", -85 * MIB)
    large = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 3}
    build_model(scene.folder / "models/real", config=large)
    scene.write("chat: {source: ./models/real, memory_limit: 90MiB}")
    scene.start(engine_command="")
    failed = await scene.event("apply_failed")
    assert f"it reached {50 * MIB:,} bytes, its control group's limit" in failed["error"]


@pytest.mark.mlx
async def test_a_real_engine_serves_within_it(scene: Scene) -> None:
    build_model(scene.folder / "models/real")
    scene.write("chat: {source: ./models/real, memory_limit: 100MiB}")
    scene.start(engine_command="")
    await scene.event("applied")
    assert scene.live.model_statuses()[0]["hard_limit_bytes"] == HARD
    assert (await ask(scene, max_tokens=8, prompt=[5, 6])).status_code == 200
