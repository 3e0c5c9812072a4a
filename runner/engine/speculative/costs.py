"""What steps cost, in seconds: predicted from a few calls, and corrected by what steps really took."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping
from itertools import pairwise
from statistics import median
from typing import Final

_RECENT: Final = 9
"""Steps of a kind that count; their median does, so that a few that were disturbed do not."""


class Curve:
    """Seconds of a model call by how many tokens it has, rows times width: lines between measured points.

    A call of 4 rows with 8 tokens costs about what one of 32 rows with one token does: its products are the same.
    """

    def __init__(self, points: Mapping[int, float]) -> None:
        """`points` are seconds by tokens, at least one. More tokens never count as cheaper."""
        self._points: list[tuple[int, float]] = []
        most = 0.0
        for tokens in sorted(points):
            most = max(most, points[tokens])
            self._points.append((tokens, most))

    def __call__(self, tokens: int) -> float:
        """Seconds of a call of so many tokens; beyond the last point, its line goes on."""
        points = self._points
        if tokens <= points[0][0]:
            return points[0][1]
        if len(points) == 1:
            return points[0][1] * tokens / points[0][0]
        lines = list(pairwise(points))
        left, right = next((line for line in lines if tokens <= line[1][0]), lines[-1])
        slope = (right[1] - left[1]) / (right[0] - left[0])
        return left[1] + slope * (tokens - left[0])


class Costs:
    """Seconds of a step: a plain one, and a round that proposes `length` tokens for each row and verifies them."""

    def __init__(self, target: Curve, draft: Curve) -> None:
        self._target = target
        self._draft = draft
        self._plain: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_RECENT))
        self._drift: deque[float] = deque([1.0], maxlen=_RECENT)
        self._errors: dict[tuple[int, int], deque[float]] = defaultdict(lambda: deque(maxlen=_RECENT))

    def record(self, rows: int, length: int, seconds: float) -> None:
        """A step of `rows` rows took `seconds`; `length` 0 is a plain one."""
        if length == 0:
            self._plain[rows].append(seconds)
            self._drift.append(seconds / self._target(rows))
        else:
            # A round is a plain step and more: one that takes less tells that plain steps were slow when measured.
            most = seconds - self._proposing(rows, length)
            if 0 < most < self._plain_step(rows):
                self._plain[rows].append(most)
            self._errors[_class(rows), length].append(seconds / self._predicted(rows, length))

    def step(self, rows: int, length: int) -> float:
        """Seconds of a step to come."""
        if length == 0:
            return self._plain_step(rows)
        # A round is a plain step and more, whatever was measured when: the machine may have been busier in between.
        least = self._plain_step(rows) + self._proposing(rows, length)
        return max(least, self._predicted(rows, length) * self._correction(_class(rows), length))

    def catching_up(self, tokens: int) -> float:
        """Seconds for the draft to read so many tokens."""
        return self._draft(tokens) if tokens else 0.0

    def _plain_step(self, rows: int) -> float:
        if rows in self._plain:
            return median(self._plain[rows])
        # Contexts are longer than those that were measured, and the machine may be busier: more so for all.
        return self._target(rows) * median(self._drift)

    def _predicted(self, rows: int, length: int) -> float:
        verifying = self._target(rows * (length + 1)) - self._target(rows)
        return self._plain_step(rows) + verifying + self._proposing(rows, length)

    def _proposing(self, rows: int, length: int) -> float:
        return self._draft(2 * rows) + (length - 1) * self._draft(rows)

    def _correction(self, kind: int, length: int) -> float:
        """How far predictions for such batches were off: for this length, or else for the nearest that was tried."""
        tried = [other for size, other in self._errors if size == kind]
        if not tried:
            return 1.0
        return median(self._errors[kind, min(tried, key=lambda other: abs(other - length))])


def _class(rows: int) -> int:
    """Batches of like sizes: up to 1, 2, 4, 8, … rows."""
    return (rows - 1).bit_length()
