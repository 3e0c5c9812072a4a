"""Who waits for what an engine answers about an adapter."""

from __future__ import annotations

import asyncio
from collections import deque
from itertools import chain

from runner.errors import EngineDied, EngineLoadError


class AdapterAnswers:
    """By the adapter's key. An engine answers in the order it was asked: an adapter that goes may be wanted back before
    it has gone."""

    def __init__(self) -> None:
        self._waiters: dict[str, deque[asyncio.Future[None]]] = {}

    def expect(self, key: str) -> asyncio.Future[None]:
        """The answer to what is asked now; raises EngineLoadError (refused, with the reason) and EngineDied."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.setdefault(key, deque()).append(waiter)
        return waiter

    def settle(self, key: str, error: EngineLoadError | None = None) -> None:
        """An answer has come."""
        waiters = self._waiters.get(key)
        waiter = waiters.popleft() if waiters else None
        if waiter is None or waiter.done():
            return
        if error is None:
            waiter.set_result(None)
        else:
            waiter.set_exception(error)

    def fail(self, error: EngineDied | EngineLoadError) -> None:
        """None will come any more."""
        for waiter in chain.from_iterable(self._waiters.values()):
            fail(waiter, error)


def fail(waiter: asyncio.Future[None], error: EngineDied | EngineLoadError) -> None:
    """Have it raise that, unless it is over."""
    if not waiter.done():
        waiter.set_exception(error)
        waiter.exception()  # retrieved here, for when nobody waits any more
