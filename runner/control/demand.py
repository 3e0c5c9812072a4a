"""Loads a deployment's engine when a request asks for it, and lets go of it when nobody has for a while."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Protocol

from runner.control.backoff import Backoff
from runner.control.room import Crowded
from runner.errors import EngineError, EngineFailed, EngineLoadError, RequestError, Unavailable
from runner.plan.spec import ModelSpec

logger = logging.getLogger(__name__)


class Owner(Protocol):
    """The deployment."""

    @property
    def spec(self) -> ModelSpec:
        """What it serves."""
        ...

    @property
    def busy(self) -> bool:
        """Whether requests are in its engine, or about to be."""
        ...

    async def load(self) -> None:
        """Bring up an engine and serve from it. Raises EngineError."""
        ...

    def load_failed(self, error: EngineError) -> None:
        """Whoever waits is told."""
        ...

    def unload(self, reason: str) -> None:
        """End the engine once it has finished what it works on."""
        ...


class Demand:
    """`failure` is why the last load came to nothing, for those who waited for it; `used_at` is when a request last
    ended, by `time.monotonic`."""

    def __init__(self, owner: Owner, emit: Callable[..., None]) -> None:
        self.failure: RequestError | None = None
        self.used_at = time.monotonic()
        self._owner = owner
        self._emit = emit
        self._backoff = Backoff(initial=1.0)
        self._not_before = 0.0
        self._loading: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def loading(self) -> bool:
        """Whether a load is under way."""
        return self._loading is not None

    def ask(self) -> None:
        """Have the engine loaded. Raises what the last attempt failed with, while it is too early for another."""
        if self._loading is not None:
            return
        if self.failure is not None and time.monotonic() < self._not_before:
            raise self.failure
        self.failure = None
        self._loading = asyncio.create_task(self._load())

    async def wait(self) -> None:
        """Return when no load is under way."""
        if self._loading is not None:
            await asyncio.wait([self._loading])

    def cancel(self) -> None:
        """Give up a load that is under way, and forget about the time since the last request."""
        loading, self._loading = self._loading, None
        if loading is not None and loading is not asyncio.current_task():
            loading.cancel()
        self._disarm()

    async def _load(self) -> None:
        started = time.monotonic()
        target = f"models.{self._owner.spec.name}"
        self._emit("loading", target=target)
        try:
            await self._owner.load()
        except EngineError as error:
            logger.warning("engine not loaded", extra={"model": self._owner.spec.name, "error": str(error)})
            self._failed(error)
        else:
            self._backoff = Backoff(initial=1.0)
            self._emit("loaded", target=target, seconds=round(time.monotonic() - started, 3))
        finally:
            if self._loading is asyncio.current_task():
                self._loading = None

    def _failed(self, error: EngineError) -> None:
        name = self._owner.spec.name
        delay = 0.0 if isinstance(error, Crowded) else self._backoff.failed(time.monotonic())
        self._not_before = time.monotonic() + delay
        if isinstance(error, EngineLoadError):
            self.failure = EngineFailed(
                f"the model {name!r} cannot be loaded: {error.message}", code="model_load_failed"
            )
        else:
            code = "no_memory" if isinstance(error, Crowded) else "model_load_failed"
            message = f"the model {name!r} could not be loaded: {error.message}"
            self.failure = Unavailable(message, retry_after=max(1.0, delay), code=code)
        self._emit("load_failed", target=f"models.{name}", error=str(error))
        self._loading = None
        self._owner.load_failed(error)

    # ------------------------------------------------------------- idleness

    def used(self) -> None:
        """A request has ended, or an engine has come up."""
        self.used_at = time.monotonic()
        self.rearm()

    def rearm(self) -> None:
        """Begin to wait for the engine to be idle for long enough, as the spec has it now."""
        self._disarm()
        timeout = self._owner.spec.idle_timeout
        if timeout:
            left = max(0.0, self.used_at + timeout - time.monotonic())
            with contextlib.suppress(RuntimeError):  # no loop runs any more
                self._timer = asyncio.get_running_loop().call_later(left, self._look)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        if not self._owner.busy:
            self._owner.unload(f"idle for {self._owner.spec.idle_timeout:g} s")
