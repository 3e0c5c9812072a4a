"""Ctrl-C during an apply, in a process of its own: a clear end, and what ran before goes on."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import psutil

from runner.control import client
from runner.control.state_folder import StateFolder
from tests.control.asking import text
from tests.control.conftest import _engines
from tests.control.scene import FAKE_ENGINE, Scene

Process = asyncio.subprocess.Process
CHAT = "chat: {source: ./models/chat, aliases: [gpt-x]}"
SLOW = f"{CHAT}\nslow: {{source: ./models/slow}}"


@asynccontextmanager
async def command(scene: Scene, *arguments: object) -> AsyncIterator[Process]:
    """`mlx-run apply` in a process of its own, with engines that need no MLX."""
    environment = {
        **os.environ,
        "MLX_RUN_STATE_DIR": str(scene.folder / "state"),
        "MLX_RUN_ENGINE_COMMAND": shlex.join([sys.executable, str(FAKE_ENGINE)]),
        "MLX_RUN_ORPHAN_GRACE": "0.5",
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "runner.cli.main", "apply", *map(str, arguments)),
        env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def ended(process: Process) -> tuple[int, str, str]:
    """How it ended, and what it had printed. Raises TimeoutError."""
    async with asyncio.timeout(30):
        out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def printed(process: Process, words: str) -> str:
    """A line that it prints, with `words` in it. Raises TimeoutError."""
    assert process.stdout is not None
    async with asyncio.timeout(30):
        while line := (await process.stdout.readline()).decode():
            if words in line:
                return line
    raise AssertionError(f"it ended without saying {words!r}")


def is_up(scene: Scene) -> bool:
    return client.is_up(StateFolder(scene.folder / "state", "dev", create=False).control_socket)


async def test_what_was_handed_over_is_undone(up: Scene) -> None:
    up.model("slow", load_seconds=60)
    file = up.folder / "beside.yaml"
    file.write_text(up.manifest.read_text() + "  slow: {source: ./models/slow}\n")
    async with command(up, file) as process:
        await up.until(lambda: "slow" in up.live.coming)
        process.send_signal(signal.SIGINT)
        code, _, err = await ended(process)
    assert code == 130
    assert "Undoing it, what ran goes on." in err
    assert "error: given up" in err
    assert [e["error"].splitlines()[0] for e in up.events if e["event"] == "apply_failed"] == ["given up"]
    assert list(up.live.deployments) == ["chat"]
    assert not up.live.coming
    assert (await text(up, model="gpt-x")).startswith("base ")


async def test_a_first_start_leaves_nothing(scene: Scene) -> None:
    scene.model("slow", load_seconds=60)
    scene.write(SLOW)
    async with command(scene, scene.manifest) as process:
        await printed(process, "models.chat: ready")
        process.send_signal(signal.SIGINT)
        code, out, err = await ended(process)
    assert code == 130
    assert "Stopped." in out
    assert "interrupted before everything was up" in err
    assert "Traceback" not in err
    assert not is_up(scene)
    assert not _engines(scene.folder)


async def test_a_detached_start_leaves_nothing(scene: Scene) -> None:
    scene.model("slow", load_seconds=60)
    scene.write(SLOW)
    async with command(scene, "-d", scene.manifest) as process:
        await printed(process, "models.chat: ready")
        process.send_signal(signal.SIGINT)
        code, _, err = await ended(process)
    assert code == 130
    assert "Stopping the runner again" in err
    await _gone(scene)


async def test_a_detached_start_that_has_not_answered_yet_leaves_nothing(scene: Scene) -> None:
    scene.write(CHAT)
    async with command(scene, "-d", scene.manifest) as process:
        started: list[psutil.Process] = []
        async with asyncio.timeout(30):
            while not started:
                known = psutil.Process(process.pid).children()
                started = [child for child in known if "runner.cli.main" in _command_line(child)]
                await asyncio.sleep(0)
        process.send_signal(signal.SIGINT)
        code, _, _ = await ended(process)
    assert code == 130
    await asyncio.to_thread(started[0].wait, 20)


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []  # it is gone


async def test_a_start_that_takes_too_long_leaves_nothing(scene: Scene) -> None:
    scene.model("slow", load_seconds=60)
    scene.write(SLOW)
    async with command(scene, "--wait", "--timeout", "1.5s", scene.manifest) as process:
        code, _, err = await ended(process)
    assert code == 1
    assert "not done within 1.5 s" in err
    await _gone(scene)


async def test_two_starts_at_once_are_one_runner(scene: Scene) -> None:
    scene.write(CHAT)
    async with command(scene, "-d", scene.manifest) as one, command(scene, "-d", scene.manifest) as other:
        results = await asyncio.gather(ended(one), ended(other))
    try:
        assert [code for code, _, _ in results] == [0, 0], results
        assert len(_engines(scene.folder)) == 1
    finally:
        client.request(StateFolder(scene.folder / "state", "dev", create=False).control_socket, "down", drain=0)
        await _gone(scene)


async def _gone(scene: Scene) -> None:
    """Returns once neither a runner nor an engine is left. Raises TimeoutError."""
    async with asyncio.timeout(20):
        while is_up(scene) or _engines(scene.folder):
            await asyncio.sleep(0.02)
