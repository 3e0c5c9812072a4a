"""Requests that are to follow on rows that have ended.

A client that waits for its answer before it asks again does so a few milliseconds after the answer's end, which is a
step or two of a batch. So rows that end together are followed by as many prompts, one after the other, and who knows
that can have them share a call. Whether they come is what those before did: clients leave, or each asks only once.
"""

from __future__ import annotations

from collections import deque
from typing import Final

_WEIGHT: Final = 0.1
"""Of the last row, in what is known of how many are followed by a request."""

_LIKELY: Final = 0.75
"""Share of rows that are followed by one, below which none is expected. Of 16 rows with answers of 128 tokens, 0.63 are
by chance, where requests come as they like."""

_LEAST: Final = 0.5
"""Such a share counts as so much, for it not to take long until new clients are known for what they are."""

_SOON: Final = 0.05
"""Seconds after which a request that comes does not follow on anything, though no step has passed since."""


class Successors:
    """Counts rows that end, and the requests that come within so many `steps` after. Times are in seconds."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._step = 0
        self._ended: deque[tuple[int, float]] = deque()
        self._share = 1.0

    @property
    def expected(self) -> int:
        """Requests that are likely to come."""
        return len(self._ended) if self._share >= _LIKELY else 0

    def ended(self, rows: int, now: float) -> None:
        """So many rows have come to their ends."""
        self._ended.extend([(self._step, now)] * rows)

    def arrived(self, now: float) -> None:
        """A request has come."""
        self._forget(now)
        if self._ended:
            self._ended.popleft()
            self._share += _WEIGHT * (1 - self._share)

    def stepped(self, now: float) -> None:
        """A step begins."""
        self._step += 1
        self._forget(now)

    def _forget(self, now: float) -> None:
        """Who has not come by now does not."""
        while self._ended and (self._ended[0][0] <= self._step - self._steps or self._ended[0][1] < now - _SOON):
            self._ended.popleft()
            self._share = max(_LEAST, self._share - _WEIGHT * self._share)
