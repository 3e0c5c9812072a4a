"""Brings a deployment's engine back after it has ended by itself, with backoff."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Protocol

from runner.control.backoff import Backoff
from runner.control.engine_process import EngineProcess
from runner.errors import EngineError

logger = logging.getLogger(__name__)


class Owner(Protocol):
    """The deployment."""

    state: str

    @property
    def name(self) -> str:
        """The manifest's name for it."""
        ...

    async def bring_up_again(self) -> tuple[EngineProcess, str]:
        """An engine of the current spec, and what it has read that is not what was planned. Raises EngineError."""
        ...

    def came_back(self, engine: EngineProcess, changed: str) -> None:
        """Serve from it."""
        ...


class Restarts:
    """Tries until an engine is up, one try at a time."""

    def __init__(self, owner: Owner, emit: Callable[..., None]) -> None:
        self._owner = owner
        self._emit = emit
        self._backoff = Backoff()
        self._task: asyncio.Task[None] | None = None

    @property
    def stable(self) -> float:
        """Seconds that an engine has to stay up for its end to be the first again."""
        return self._backoff.stable

    def started(self) -> None:
        """An engine is up."""
        self._backoff.started(time.monotonic())

    def begin(self) -> None:
        """Bring an engine up, unless that is being done."""
        if self._task is None:
            self._task = asyncio.create_task(self._bring_back())

    def cancel(self) -> None:
        """It is not needed any more."""
        task, self._task = self._task, None
        if task is not None and task is not asyncio.current_task():
            task.cancel()

    async def _bring_back(self) -> None:
        owner = self._owner
        while owner.state != "stopped":
            delay = self._backoff.failed(time.monotonic())
            owner.state = "backoff"
            self._emit("engine_backoff", target=f"models.{owner.name}", seconds=delay)
            await asyncio.sleep(delay)
            try:
                engine, changed = await owner.bring_up_again()
            except EngineError as error:
                logger.warning("engine did not come back", extra={"model": owner.name, "error": str(error)})
                continue
            owner.came_back(engine, changed)
            return  # should it have died already, another task has taken over
