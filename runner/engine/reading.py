"""Reading requests beside the steps: a thread between the transport's inbox and the main thread.

To render a request and to tokenise it takes 0.3 to 0.7 ms for 256 tokens, in which the device would be idle if the main
thread did it. Most of that is the tokenizer's, which lets other threads run, unless it is in Python; for the rest this
thread needs the interpreter's lock. The main thread gives it back when it waits for the device, and waits for it in its
turn where that is over while this one renders: until that has gone on to the tokenizer, or for SWITCH seconds.

What steps of 3.7 ms become, 1.4 of them Python (tests/bench/reading_cost.py, two cores; the mean, and of a hundred the
longest): with 4 requests of 250 tokens in each, 4.8 and 8.0 ms if the main thread reads them, 3.8 and 5 so. With a
request of 3,000 messages in every 25th (33 ms, 20 of them jinja's), 4.85 and 33 ms, and 4.1 and 7 so; with Python's own
interval of 5 ms, 4.4 and 18.
"""

from __future__ import annotations

import logging
import threading
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Final

from runner.engine.arrivals import Arrivals, Arrived
from runner.engine.transport import Woken
from runner.protocol import Configure, Generate

if TYPE_CHECKING:
    from runner.engine.intake import Intake
    from runner.engine.limits import Limits

logger = logging.getLogger(__name__)

SWITCH: Final = 0.001
"""Seconds after which a thread that runs Python lets another one, where requests are read so."""


class Reading:
    """Hands on what is in `inbox`, in order, to whoever gets from `events`: requests once they are read.

    Those that were cancelled before are not read, nor handed on: `dropped` are so many. One that the engine would
    refuse unread is handed on as it is.
    """

    def __init__(self, inbox: SimpleQueue[Any]) -> None:
        self.events: SimpleQueue[Arrived] = SimpleQueue()
        self._inbox = inbox
        self._arrivals = Arrivals(inbox)
        self._thread: threading.Thread | None = None
        self._busy = False
        self._closed = False

    @property
    def dropped(self) -> int:
        """Requests that were cancelled unread."""
        return self._arrivals.dropped

    def behind(self) -> bool:
        """Whether something is here that whoever gets from `events` has not got; in the order in which it moves."""
        return not self._inbox.empty() or self._arrivals.waiting or self._busy or not self.events.empty()

    def start(self, intake: Intake, limits: Limits) -> None:
        """Read requests for `intake`, whose limits are these at first."""
        self._thread = threading.Thread(target=self._run, args=(intake, limits), name="engine-requests", daemon=True)
        self._thread.start()

    def close(self, timeout: float) -> None:
        """Read no more, and wait for the end of the request that is being read, for at most `timeout` seconds.

        A process that ends while a thread of it is in the tokenizer aborts, when that wants the interpreter's lock.
        """
        self._closed = True
        if self._thread is not None:
            self._inbox.put(Woken())
            self._thread.join(timeout)

    def _run(self, intake: Intake, limits: Limits) -> None:
        while not self._closed:
            self._arrivals.wait()
            self._busy = True
            event = self._arrivals.pop()
            try:
                if isinstance(event, Configure):
                    limits = limits.changed(event)  # the engine's own are changed when this is handed on
                elif isinstance(event, Generate) and intake.refusal(event, limits) is None:
                    event = intake.prepare(event, limits)
            except BaseException:  # whoever gets it reads it again, and tells what is wrong; this thread goes on
                logger.exception("what has arrived could not be looked at")
            self._busy = False  # before it is handed on: whoever gets it may wait for what is still here
            self.events.put(event)
