"""Whoever reads what a runner prints may leave: a pager is closed, or Ctrl-C ends the whole pipe."""

from __future__ import annotations

import asyncio
import os
import signal

from runner.control import client
from runner.control.state_folder import StateFolder
from tests.cli.test_interrupt import command, is_up, printed
from tests.control.conftest import _engines
from tests.control.scene import Scene


async def test_a_runner_that_nobody_reads_goes_on_and_stops_when_told(scene: Scene) -> None:
    scene.write("chat: {source: ./models/chat}")
    async with command(scene, scene.manifest) as process:
        await printed(process, "Ready")
        _hang_up(process)
        (died,) = _engines(scene.folder)
        os.kill(died, signal.SIGKILL)
        control = StateFolder(scene.folder / "state", "dev", create=False).control_socket
        async with asyncio.timeout(30):
            while client.request(control, "status")["models"][0]["pid"] in (None, died):
                await asyncio.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        async with asyncio.timeout(30):
            said, code = await asyncio.gather(process.stderr.read(), process.wait())
    assert (code, said) == (0, b"")
    assert not is_up(scene)


def _hang_up(process: asyncio.subprocess.Process) -> None:
    """Close our end of its output."""
    transport = process._transport.get_pipe_transport(1)  # type: ignore[attr-defined]
    transport.close()
