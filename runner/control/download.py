"""Fetches a hub repository in a process of its own: the runner never imports the hub's client."""

from __future__ import annotations

import asyncio
from pathlib import Path

from runner.errors import EngineLoadError
from runner.processes import python_module


async def download(repo: str, revision: str, log: Path) -> None:
    """Fill the hub cache with `repo` at `revision`. Raises EngineLoadError with the reason. Cancelling ends it."""
    with log.open("ab") as stream:
        process = await asyncio.create_subprocess_exec(
            *python_module("runner.control.fetch", repo, revision),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=stream,
            start_new_session=True,
        )
    try:
        output, _ = await process.communicate()
    except asyncio.CancelledError:
        process.kill()
        await process.wait()
        raise
    if process.returncode:
        reason = output.decode(errors="replace").strip() or f"the download ended with code {process.returncode}"
        raise EngineLoadError(
            f"{repo} ({revision}) could not be downloaded: {reason}",
            hint="Check the name and the network, or point `source` at a local folder.",
        )
