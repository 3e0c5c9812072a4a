"""A runner that is started again finds the engines of the one that was killed."""

import asyncio
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from runner.control.compile import compile_manifest
from runner.control.compiled import Request
from runner.control.state_folder import StateFolder
from runner.protocol import VERSION, EngineSpec, Hello, Loaded, Shutdown, decoder_to_engine, encode_frame
from tests.control.scene import FAKE_ENGINE, Scene
from tests.control.test_runner import ONE, pid, text


async def killed_runner(scene: Scene) -> int:
    """Run `mlx-run apply` in a process of its own until it is ready, then kill -9 it. Returns its engine's pid."""
    environment = {
        **os.environ,
        "MLX_RUN_STATE_DIR": str(scene.folder / "state"),
        "MLX_RUN_ENGINE_COMMAND": shlex.join([sys.executable, str(FAKE_ENGINE)]),
        "MLX_RUN_ORPHAN_GRACE": "10",
    }
    command = [sys.executable, "-m", "runner.cli.main", "apply", str(scene.manifest)]
    process = await asyncio.create_subprocess_exec(*command, env=environment, stdout=subprocess.PIPE)
    assert process.stdout is not None
    async with asyncio.timeout(20):
        while b"Ready after" not in await process.stdout.readline():
            assert not process.stdout.at_eof()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (engine,) = [int(c) for c in children if b"fake_engine" in Path(f"/proc/{c}/cmdline").read_bytes()]
    process.kill()
    await process.wait()
    process._transport.close()  # type: ignore[attr-defined]  # its pipe is held open by nobody else
    return engine


linux = pytest.mark.skipif(sys.platform != "linux", reason="finds the engine by /proc")


@linux
async def test_an_engine_that_serves_what_is_wanted_is_adopted(scene: Scene) -> None:
    scene.write(ONE)
    engine = await killed_runner(scene)
    scene.start()
    await scene.event("engine_adopted")
    await scene.until(lambda: any(e["event"] in ("applied", "unchanged") for e in scene.events))
    assert pid(scene) == engine
    assert (await text(scene)).startswith("base ")
    key = scene.live.deployments["chat"].spec.adapters[0].key
    assert (await text(scene, adapter_name="pirate")).startswith(key)


@linux
async def test_what_was_edited_meanwhile_is_changed_in_the_adopted_engine(scene: Scene) -> None:
    scene.write(ONE)
    engine = await killed_runner(scene)
    scene.write("chat: {source: ./models/chat, adapters: {new: ./adapters/shout}}")
    scene.start()
    await scene.event("applied")
    assert pid(scene) == engine
    key = scene.live.deployments["chat"].spec.adapters[0].key
    assert (await text(scene, adapter_name="new")).startswith(key)


@linux
async def test_an_engine_of_something_else_is_told_to_end(scene: Scene) -> None:
    scene.model("other")
    scene.write(ONE)
    engine = await killed_runner(scene)
    scene.write("chat: {source: ./models/other}")
    (scene.folder / "models/other/config.json").write_text('{"model_type": "llama", "fake": {}, "other": true}')
    scene.start()
    await scene.event("applied")
    assert pid(scene) != engine
    async with asyncio.timeout(10):
        while Path(f"/proc/{engine}").exists():
            await asyncio.sleep(0.01)


@linux
async def test_an_adopted_engine_that_dies_is_started_again(scene: Scene) -> None:
    scene.write(ONE)
    engine = await killed_runner(scene)
    scene.start()
    await scene.event("engine_adopted")
    await scene.until(lambda: any(e["event"] in ("applied", "unchanged") for e in scene.events))
    os.kill(engine, signal.SIGKILL)
    await scene.event("engine_restarted")
    assert pid(scene) != engine
    assert (await text(scene)).startswith("base ")


async def test_what_a_dead_engine_left_behind_is_forgotten(scene: Scene) -> None:
    scene.write(ONE)
    folder = scene.folder / "state" / "dev" / "e"
    folder.mkdir(parents=True)
    (folder / "ab12cd34.json").write_text('{"model": "chat", "path": "/nowhere", "digest": "x"}')
    (folder / "damaged.json").write_text("{")
    scene.start()
    await scene.event("applied")
    assert {p.stem for p in folder.glob("*.json")} == {scene.live.deployments["chat"].engine.id}


async def test_an_engine_of_another_version_is_told_to_end(scene: Scene) -> None:
    scene.write(ONE)
    state = StateFolder(scene.folder / "state", "dev")
    desired = compile_manifest(Request((scene.manifest,))).desired
    assert desired is not None
    digest = desired.models[0].process_digest
    state.engine_spec("ab12cd34").write_bytes(
        msgspec.json.encode(EngineSpec(model="chat", path="/nowhere", digest=digest))
    )
    told: list[object] = []

    async def later_version(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(encode_frame(Hello(VERSION + 1, 1, "chat", digest, loaded=True)))
        loaded = Loaded(weights_bytes=1, active_bytes=1, seconds=0.0, max_context=8, device="fake")
        writer.write(encode_frame(loaded))
        decoder = decoder_to_engine()
        while data := await reader.read(65536):
            told.extend(decoder.feed(data))
        writer.close()

    async with await asyncio.start_unix_server(later_version, str(state.engine_socket("ab12cd34"))):
        scene.start()
        await scene.event("applied")
    assert told == [Shutdown(0.0)]
    assert scene.live.deployments["chat"].engine.id != "ab12cd34"
    assert (await text(scene)).startswith("base ")
