"""What has arrived from the runner: in order, and no more of it between two steps than rows can wait for.

To read a request (to render and tokenise it) takes as long as its text is, and no row gets a token meanwhile. So after
a certain amount of text a step comes first. Requests that were cancelled while they waited here are not read at all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Final

from runner.engine.transport import Disconnected, Event
from runner.protocol import Cancel, Generate

AT_ONCE: Final = 64 * 1024
"""Characters of requests that are read between two steps: some 20 ms. The last of them may go beyond."""

TOGETHER: Final = 16 * 1024
"""The same of requests for which it looks out while it reads others: some 5 ms."""


class Arrivals:
    """The events of `inbox`, for the main thread. `dropped` counts requests that were cancelled unread."""

    def __init__(self, inbox: SimpleQueue[Event]) -> None:
        self.dropped = 0
        self._inbox = inbox
        self._events: deque[Event] = deque()

    @property
    def waiting(self) -> bool:
        """Whether something was left for after the next step."""
        return bool(self._events)

    def take(self, *, busy: bool, patience: Callable[[], float | None]) -> Iterator[Event]:
        """What is to be handled before the next step.

        If there is nothing, and the engine is not `busy`, waits for something for `patience` seconds, without end for
        None. What arrives while requests are read is taken as well, or while the first event is that ends such a wait:
        who comes with others goes on with them, and one step, or one call, for all costs less than one for each.
        """
        if not busy and not self._events:
            with suppress(Empty):
                self._events.append(self._inbox.get(timeout=patience()))
        self._look()
        read = 0
        while self._events and read < AT_ONCE:
            event = self._events.popleft()
            if isinstance(event, Generate):
                read += _characters(event)
            yield event
            if (read or not busy) and not self._events and read < TOGETHER:
                self._look()

    def _look(self) -> None:
        """Take what is in the inbox."""
        with suppress(Empty):
            while True:
                self._events.append(self._inbox.get_nowait())
        if len(self._events) > 1:
            self._drop_cancelled()

    def _drop_cancelled(self) -> None:
        """Those whose client has left, and those whose runner is gone."""
        kept: deque[Event] = deque()
        cancelled: set[int] = set()
        gone = False
        for event in reversed(self._events):
            if isinstance(event, Generate) and (gone or event.id in cancelled):
                self.dropped += 1
                continue
            if isinstance(event, Cancel):
                cancelled.add(event.id)
            elif isinstance(event, Disconnected):
                gone = True
            kept.appendleft(event)
        self._events = kept


def _characters(request: Generate) -> int:
    if request.prompt is not None:
        return len(request.prompt)
    return sum(len(str(message.get("content", ""))) for message in request.messages or ())
