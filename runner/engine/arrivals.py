"""What has arrived from the runner: in order, and no more of it between two steps than rows can wait for.

To read a request (to render and tokenise it) takes as long as its text is, and where the main thread does it, no row
gets a token meanwhile. So after a certain amount of text a step comes first; requests that have been read already
(`reading.py`) are no such text. Requests that were cancelled while they waited here are not read at all, or not taken.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Any, Final

from runner.engine.prepared import Prepared
from runner.engine.transport import Disconnected, Event
from runner.protocol import Cancel, Generate

AT_ONCE: Final = 64 * 1024
"""Characters of requests that are read between two steps: some 20 ms. The last of them may go beyond."""

TOGETHER: Final = 16 * 1024
"""The same of requests for which it looks out while it reads others: some 5 ms."""

TOGETHER_SECONDS: Final = 0.005
"""The same where they are read by another thread, for which nothing else waits."""

Arrived = Event | Prepared
"""What the main thread gets."""


class Arrivals:
    """The events of `inbox`, for one thread. `dropped` counts requests that were cancelled while they waited here."""

    def __init__(self, inbox: SimpleQueue[Any], unread: Callable[[], bool] = lambda: False) -> None:
        """`unread` says whether another thread, which fills `inbox`, has something that it has not read yet."""
        self.dropped = 0
        self._inbox = inbox
        self._unread = unread
        self._events: deque[Arrived] = deque()

    @property
    def waiting(self) -> bool:
        """Whether something was left for after the next step, or is being read."""
        return bool(self._events) or self._unread()

    def wait(self) -> None:
        """Return once there is something to `pop`."""
        if not self._events:
            self._events.append(self._inbox.get())
        self._look()

    def pop(self) -> Arrived:
        """The next one, which is there."""
        return self._events.popleft()

    def take(self, *, busy: bool, patience: Callable[[], float | None]) -> Iterator[Arrived]:
        """What is to be handled before the next step.

        If there is nothing, and the engine is not `busy`, waits for something for `patience` seconds, without end for
        None. What arrives while requests are read is taken as well, or while the first event is that ends such a wait:
        who comes with others goes on with them, and one step, or one call, for all costs less than one for each. So
        where a request was all that there is to do, those that another thread is reading are waited for, a moment.
        """
        if not busy and not self._events:
            with suppress(Empty):
                self._events.append(self._inbox.get(timeout=patience()))
        self._look()
        read, requests, until = 0, False, monotonic() + TOGETHER_SECONDS
        while self._events and read < AT_ONCE:
            event = self._events.popleft()
            if isinstance(event, Generate):
                read += _characters(event)
            requests = requests or isinstance(event, Prepared)
            yield event
            if (read or not busy) and not self._events and read < TOGETHER:
                self._look()
                if requests and not (busy or self._events) and self._unread():
                    with suppress(Empty):
                        self._events.append(self._inbox.get(timeout=max(0.0, until - monotonic())))

    def _look(self) -> None:
        """Take what is in the inbox."""
        ended = False
        with suppress(Empty):
            while True:
                event = self._inbox.get_nowait()
                ended = ended or isinstance(event, Cancel | Disconnected)
                self._events.append(event)
        if ended:
            self._drop_cancelled()

    def _drop_cancelled(self) -> None:
        """Those whose client has left, and those whose runner is gone."""
        kept: deque[Arrived] = deque()
        cancelled: set[int] = set()
        gone = False
        for event in reversed(self._events):
            if isinstance(event, Generate | Prepared) and (gone or event.id in cancelled):
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
