"""Requests that come while a deployment has no engine: they are held until one is up, for so long and so many."""

from __future__ import annotations

import asyncio
from typing import Final, Protocol

from runner.control.demand import Demand
from runner.control.engine_process import EngineProcess
from runner.errors import NotServed, Unavailable

_MAX_WAITING: Final = 1024
"""Requests that may wait for an engine to load; more are told to come back."""


class Owner(Protocol):
    """The deployment."""

    @property
    def name(self) -> str:
        """The manifest's name for it."""
        ...

    @property
    def state(self) -> str:
        """What it is doing."""
        ...

    @property
    def engine(self) -> EngineProcess | None:
        """The engine that takes requests."""
        ...

    @property
    def last_error(self) -> str:
        """What last went wrong with it."""
        ...


class HeldRequests:
    """`count` is how many are held now. `patience` in seconds is how long each of them waits; `demand` loads what is
    loaded at the next request."""

    def __init__(self, owner: Owner, demand: Demand, patience: float) -> None:
        self.count = 0
        self._owner = owner
        self._demand = demand
        self._patience = patience
        self._ready = asyncio.Event()

    async def engine(self) -> EngineProcess:
        """The engine, once it is up.

        Raises Unavailable where none came up in time or too many wait, NotServed where the deployment has stopped, and
        what a load that was asked for failed with.
        """
        owner = self._owner
        if owner.state == "stopped":
            raise self._not_served()
        if self.count >= _MAX_WAITING:
            raise Unavailable(f"too many requests wait for {owner.name!r} to load", retry_after=5.0)
        self.count += 1
        try:
            # Not wait_for: before Python 3.12 it can lose a cancellation that comes as its wait completes.
            async with asyncio.timeout(self._patience):
                await self._be_ready()
        except TimeoutError:
            reason = f": {owner.last_error.splitlines()[0]}" if owner.last_error else ""
            raise Unavailable(
                f"the model {owner.name!r} is not ready ({owner.state}){reason}", retry_after=5.0, code="model_loading"
            ) from None
        finally:
            self.count -= 1
        if owner.state == "stopped":
            raise self._not_served()
        if owner.engine is None:
            raise Unavailable(f"the model {owner.name!r} is not ready ({owner.state})", retry_after=1.0)
        return owner.engine

    async def _be_ready(self) -> None:
        """Return once an engine is up, or none will be. Raises why a load that was asked for came to nothing."""
        owner = self._owner
        while owner.engine is None and owner.state != "stopped":
            if owner.state == "idle":
                self._demand.ask()
            await self._ready.wait()
            if owner.engine is None and owner.state == "idle" and self._demand.failure is not None:
                raise self._demand.failure

    def let_go(self) -> None:
        """An engine is up, or none will be: nobody waits from now on."""
        self._ready.set()

    def hold(self) -> None:
        """There is no engine: whoever comes waits."""
        self._ready.clear()

    def wake(self) -> None:
        """Have those that wait look at how things are."""
        self._ready.set()
        self._ready.clear()

    def _not_served(self) -> NotServed:
        return NotServed(
            f"the model {self._owner.name!r} is not served any more", param="model", code="model_not_found"
        )
