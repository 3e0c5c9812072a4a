"""Steps for nobody at loading: their kernels are compiled, their graphs kept, and it is known how long they take.

A step is more than its model calls, and in a batch whose rows come and go hardly one can be timed: what is found here
is what is expected of batches there. One row has every length first; then come as many rows as there may be, and sizes
in between, while there is time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Final

from runner.engine.speculative.policy import lengths
from runner.engine.speculative.speculation import Speculation
from runner.protocol import Generate

logger = logging.getLogger(__name__)

_SECONDS: Final = 2.0
"""After which no other size is begun."""

_STEPS: Final = 16
"""Of a kind, at most: two build graphs, the third one that is kept, and those at both ends are not timed."""

_BETWEEN: Final = (32, 8)
"""Sizes between one row and all."""

_MOST_OF: Final = 0.75
"""Of the rows, that have to be together."""

Trial = Callable[[Sequence[Generate], Callable[[], bool]], str | None]
"""Generates for nobody until it is enough; returns why that failed, or None."""


def rehearse(speculation: Speculation, most: int, max_rows: int, trial: Trial) -> str | None:
    """Have steps of every kind that may be chosen: of up to `max_rows` rows and `most` proposals.

    Returns why one row fails, or None; where more rows do, as for want of memory, there are no such steps.
    """
    began = time.perf_counter()
    for rows in sizes(max_rows):
        if rows > 1 and time.perf_counter() - began > _SECONDS:
            return None
        for length in (*lengths(most), 0):
            request = Generate(id=-1, prompt=[0, 0, 0], max_tokens=_STEPS * (length + 1))
            with speculation.rehearsing(length):
                failure = trial([request] * rows, lambda: speculation.heard >= _MOST_OF * rows)  # noqa: B023
            if failure is not None:
                if rows > 1:
                    logger.warning("steps of %d rows are not rehearsed: %s", rows, failure)
                return None if rows > 1 else failure
    return None


def sizes(max_rows: int) -> list[int]:
    """Rows of the batches that are rehearsed, in order."""
    return [1, *([max_rows] if max_rows > 1 else []), *(rows for rows in _BETWEEN if rows < max_rows)]
