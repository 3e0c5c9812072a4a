"""An attempt to apply something: ended by its time limit, or by whoever asked for it giving up."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from runner.errors import Interrupted, MlxRunError, RunnerError

T = TypeVar("T")

_NOTHING_CHANGED = "What ran before goes on as it was."


class Attempt:
    """`given_up` is why it is being undone, None while it is not."""

    def __init__(self, timeout: float | None = None) -> None:
        """`timeout` in seconds, None for none."""
        self.given_up: MlxRunError | None = None
        self._timeout = timeout
        self._asked = asyncio.Event()

    def give_up(self) -> None:
        """Undo it, unless it is over or past the point from which it is carried through."""
        self._asked.set()

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """`work`'s result. When the attempt is given up `work` is cancelled, and what it returns or raises counts: it
        may well be that it was too late."""
        task = asyncio.ensure_future(work)
        asked = asyncio.ensure_future(self._asked.wait())
        try:
            await asyncio.wait({task, asked}, timeout=self._timeout, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                self.given_up = (
                    Interrupted("given up", hint=_NOTHING_CHANGED)
                    if asked.done()
                    else RunnerError(f"not done within {self._timeout:g} s", hint=_NOTHING_CHANGED)
                )
                task.cancel()
            return await task
        except asyncio.CancelledError:
            if task.done() and self.given_up is not None:
                raise self.given_up from None  # it was not begun yet
            task.cancel()
            await asyncio.wait({task})
            raise
        finally:
            asked.cancel()
