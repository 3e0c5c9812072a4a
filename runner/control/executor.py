"""Carries out a plan: prepare what can still be undone, commit in one step, clean up behind.

prepare  open new ports, end what has to make room, start new engines and prove them, load new adapters; a failure
         undoes all of it
record   the generation is written, so that whatever ends the runner from here on, it is known what was to be live
commit   switch deployments, publish the directory, update listeners: no await, so no request sees half of it
clean up drain old engines, old adapters, old ports, in the background, up to the drain timeout
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from runner.control.commit import Commit
from runner.control.live import Live
from runner.control.preparation import Preparation
from runner.control.progress import Progress
from runner.plan.actions import Plan
from runner.plan.spec import Desired


class Executor:
    """Executes one plan on `live`."""

    def __init__(self, live: Live, plan: Plan, desired: Desired) -> None:
        self._live = live
        self._desired = desired
        progress = Progress(live)
        self._preparation = Preparation(live, plan, desired, progress)
        self._commit = Commit(live, plan, desired, self._preparation, progress)

    async def execute(self, record: Callable[[], Awaitable[None]]) -> None:
        """Make it so, or leave everything as it was and raise what went wrong.

        `record` is awaited once everything is proven and before anything is switched over; from there on cancelling
        comes too late. Raises MlxRunError, such as EngineLoadError, EngineDied, ListenerError, and what `record`
        raises.
        """
        assert not self._desired.downloads, "what is not there yet cannot be carried out"
        self._live.room.limit = self._desired.memory_limit_bytes
        try:
            await self._preparation.prepare()
            self._preparation.require_life()
            await _to_the_end(record())
            clean_up = self._commit.switch_over()
        except BaseException:
            await _to_the_end(self._preparation.undo())
            raise
        for work in clean_up:
            self._live.in_background(work())


async def _to_the_end(work: Awaitable[None]) -> None:
    """Wait for what must not be left half done; being cancelled meanwhile changes nothing."""
    task = asyncio.ensure_future(work)
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.shield(task)
    task.result()
