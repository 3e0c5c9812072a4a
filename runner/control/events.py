"""What happened, for people who watch: a bounded list, and a live feed for each subscriber."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger(__name__)

Event = dict[str, Any]

_KEPT = 500
_BEHIND = 1000
"""Events a subscriber may lag behind before its oldest are dropped."""


class EventLog:
    """Events are plain dicts with `event` (a constant name) and `time` (seconds since the epoch).

    `observer` sees each event as it happens, in the event loop's thread.
    """

    def __init__(self, observer: Callable[[Event], None] | None = None) -> None:
        self._observer = observer
        self.recent: deque[Event] = deque(maxlen=_KEPT)
        self._subscribers: set[asyncio.Queue[Event]] = set()

    def emit(self, event: str, **fields: Any) -> None:
        """Record an event and hand it to whoever listens."""
        logger.info(event, extra=fields)
        item: Event = {"event": event, "time": round(time.time(), 3), **fields}
        self.recent.append(item)
        if self._observer is not None:
            self._observer(item)
        for queue in self._subscribers:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(item)

    @contextmanager
    def subscribe(self) -> Iterator[asyncio.Queue[Event]]:
        """A queue that gets every event from now on."""
        queue: asyncio.Queue[Event] = asyncio.Queue(_BEHIND)
        self._subscribers.add(queue)
        try:
            yield queue
        finally:
            self._subscribers.discard(queue)
