"""What happened, for people who watch: a bounded list, and a live feed for each subscriber."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

logger = logging.getLogger(__name__)

Event = dict[str, Any]

_KEPT = 500
_BEHIND = 1000
"""Events a subscriber may lag behind before its oldest are dropped."""

_RESERVED = frozenset({*vars(logging.makeLogRecord({})), "message", "asctime"})
"""Names that a log record has of its own, and refuses to have twice."""

_LAST = "stopped"
"""The event after which there is nothing to wait for."""


class EventLog:
    """Events are plain dicts with `event` (a constant name) and `time` (seconds since the epoch).

    `observer` sees each event as it happens, in the event loop's thread. What it raises is logged: events are told in
    the middle of things that have to go on.
    """

    def __init__(self, observer: Callable[[Event], None] | None = None) -> None:
        self._observer = observer
        self.recent: deque[Event] = deque(maxlen=_KEPT)
        self._subscribers: set[asyncio.Queue[Event]] = set()

    def emit(self, event: str, **fields: Any) -> None:
        """Record an event and hand it to whoever listens."""
        logger.info(event, extra={f"event_{k}" if k in _RESERVED else k: v for k, v in fields.items()})
        self.recent.append(self.tell(event, **fields))

    def tell(self, event: str, **fields: Any) -> Event:
        """Hand an event to whoever listens, and keep it nowhere: how far something has come is of the moment."""
        item: Event = {"event": event, "time": round(time.time(), 3), **fields}
        if self._observer is not None:
            try:
                self._observer(item)
            except Exception:
                logger.exception("an event could not be shown", extra={"shown": event})
        for queue in self._subscribers:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(item)
        return item

    @contextmanager
    def subscribe(self) -> Iterator[asyncio.Queue[Event]]:
        """A queue that gets every event from now on."""
        queue: asyncio.Queue[Event] = asyncio.Queue(_BEHIND)
        self._subscribers.add(queue)
        try:
            yield queue
        finally:
            self._subscribers.discard(queue)

    async def history(self, *, follow: bool) -> AsyncIterator[Event]:
        """What is kept, oldest first; with `follow` also what happens from then on, until the runner has stopped."""
        with self.subscribe() as queue:
            for event in list(self.recent):
                yield event
            while follow:
                event = await queue.get()
                yield event
                follow = event["event"] != _LAST

    async def changes(
        self, *, gap: float = 0.25, beat: float | None = None, within: float | None = None
    ) -> AsyncIterator[None]:
        """Yields at once and then whenever something has happened, until the runner has stopped.

        Times are seconds: at least `gap` lies between two yields, so a burst of events is one; `beat` is the longest
        between two, for what changes without an event; `within` ends it, with a last yield at that time.
        """
        loop = asyncio.get_running_loop()
        end = float("inf") if within is None else loop.time() + within
        with self.subscribe() as queue:
            yield
            while loop.time() < end:
                last = loop.time()
                await asyncio.sleep(min(gap, end - last))
                until = min(end, last + beat) if beat is not None else end
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(None if until == float("inf") else until):
                        if await _burst(queue):
                            return
                yield


async def _burst(queue: asyncio.Queue[Event]) -> bool:
    """Takes what is there, at least one event. Whether the last event was among it."""
    names = [(await queue.get())["event"]]
    while not queue.empty():
        names.append(queue.get_nowait()["event"])
    return _LAST in names
