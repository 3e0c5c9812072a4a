"""Engines that serve nothing new, and end once they have finished what they work on."""

from __future__ import annotations

import asyncio

from runner.control.engine_process import EngineProcess


class Unloading:
    """Each ends in a task of its own; `drain` in seconds is what it has once it is idle."""

    def __init__(self, drain: float) -> None:
        self._drain = drain
        self._tasks: dict[EngineProcess, asyncio.Task[None]] = {}

    def begin(self, engine: EngineProcess) -> None:
        """Have it end, however long its requests take."""
        task = self._tasks[engine] = asyncio.create_task(self._finish(engine))
        task.add_done_callback(lambda _: self._tasks.pop(engine, None))

    def hand_over(self) -> list[EngineProcess]:
        """Those that have not ended, for the caller to end."""
        for task in self._tasks.values():
            task.cancel()
        return list(self._tasks)

    async def _finish(self, engine: EngineProcess) -> None:
        if engine.alive:
            await engine.connection.wait_idle()
        await engine.drain(self._drain)
