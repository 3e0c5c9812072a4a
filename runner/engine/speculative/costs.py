"""What steps cost, in seconds: what they took, and until that is known, what a few calls at loading let expect."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Mapping
from itertools import pairwise
from math import log2
from statistics import median
from typing import Final

_RECENT: Final = 5
"""Steps of a kind that count; their median does, so that a few that were disturbed do not."""

_AVERAGED: Final = 50
"""Plain steps that their average is over."""

ENOUGH: Final = 3
_ENOUGH_PLAIN: Final = 5
"""Rounds of a kind, and plain steps, that have to be timed before it is known what they cost."""

_ENOUGH_DISTURBED: Final = 12
"""Rounds that have to be seen where too few can be timed: what the third fastest of them took is what they cost, or
the median, where it is known what the work beside them took."""

_LEAST: Final = 0.2
"""Of what is predicted, that a round takes at least: what others took may have been less than was thought."""


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
    """Seconds of a step: a plain one, and a round that proposes `length` tokens for each row and verifies them.

    Batches of like sizes learn from each other: what is kept of a step is how far the prediction for it was off.
    """

    def __init__(self, target: Curve, draft: Curve, reading: Curve | None = None) -> None:
        """`reading` is of calls by which the draft reads what it has missed, if they are others than its steps."""
        self._target = target
        self._draft = draft
        self._reading = reading or draft
        self._rehearsed: dict[int, dict[int, float]] = {}
        self._among: dict[tuple[int, int], deque[tuple[float, bool]]] = defaultdict(
            lambda: deque(maxlen=_ENOUGH_DISTURBED)
        )
        self._errors: dict[tuple[int, int], deque[float]] = defaultdict(lambda: deque(maxlen=_RECENT))
        self._disturbed: dict[tuple[int, int], deque[float]] = defaultdict(lambda: deque(maxlen=_ENOUGH_DISTURBED))
        self._medians: dict[tuple[int, int], float] = {}
        self._averages: dict[int, float] = {}
        self._predictions: dict[tuple[int, int], float] = {}
        self.timed: Counter[tuple[int, int]] = Counter()
        """Steps that were timed, by size class and length."""

    def record(self, rows: int, length: int, seconds: float) -> None:
        """A step of `rows` rows took `seconds`; `length` 0 is a plain one."""
        kind = size, _ = size_class(rows), length
        error = seconds / self.predicted(rows, length)
        self._errors[kind].append(error)
        self._among[kind].append((error, False))
        self.timed[kind] += 1
        if self.timed[kind] >= ENOUGH or not self.known(rows, length):
            self._medians[kind] = self._mostly_among(kind) or median(self._errors[kind])
        if not length:
            before = self._averages.get(size, error)
            self._averages[size] = before + (error - before) / min(self.timed[kind], _AVERAGED)

    def record_disturbed(self, rows: int, length: int, seconds: float) -> None:
        """A round took at most `seconds`: something else was done as well.

        Where rows come and go all the time there may be no others.
        """
        kind = size_class(rows), length
        if self.timed[kind] < ENOUGH:
            self._disturbed[kind].append(seconds / self.predicted(rows, length))
            if len(self._disturbed[kind]) == _ENOUGH_DISTURBED:
                self._medians[kind] = sorted(self._disturbed[kind])[_ENOUGH_DISTURBED // 4 - 1]

    def record_among_others(self, rows: int, length: int, seconds: float) -> None:
        """A round took about `seconds`, the work of others not counted.

        Where most are such, they are what counts: one that finds other rows than the one before it cannot begin before
        that is read.
        """
        kind = size_class(rows), length
        self._among[kind].append((max(_LEAST, seconds / self.predicted(rows, length)), True))
        if (found := self._mostly_among(kind)) is not None:
            self._medians[kind] = found

    def _mostly_among(self, kind: tuple[int, int]) -> float | None:
        """How far off predictions are where most of the last steps were among others' work; None elsewhere."""
        last = self._among[kind]
        if len(last) < _ENOUGH_DISTURBED or 2 * sum([among for _, among in last]) <= _ENOUGH_DISTURBED:
            return None
        return median([error for error, _ in last])

    def known(self, rows: int, length: int) -> bool:
        """Whether enough such steps have been seen."""
        kind = size_class(rows), length
        if not length:
            return self.timed[kind] >= _ENOUGH_PLAIN
        if self.timed[kind] >= ENOUGH or len(self._disturbed[kind]) == _ENOUGH_DISTURBED:
            return True
        return self._mostly_among(kind) is not None

    def step(self, rows: int, length: int) -> float:
        """Seconds of a step to come, if nothing disturbs it."""
        return self.predicted(rows, length) * self._error(size_class(rows), length)

    def average(self, rows: int) -> float:
        """Seconds that plain steps take in the long run, those that were disturbed included; some must be `known`."""
        return self.predicted(rows, 0) * self._averages[size_class(rows)]

    def predicted(self, rows: int, length: int) -> float:
        """Seconds of a step by the calls that were timed at loading, and by the steps that were rehearsed."""
        if (rows, length) not in self._predictions:
            self._predictions[rows, length] = self._calls(rows, length) * self._factor(rows, length)
        return self._predictions[rows, length]

    def rehearsed(self, rows: int, length: int, seconds: float) -> None:
        """A step of so many rows took `seconds` at loading."""
        self._rehearsed.setdefault(length, {})[rows] = seconds / self._calls(rows, length)
        self._predictions.clear()

    def _factor(self, rows: int, length: int) -> float:
        """How many times as long as its calls a step takes, by those that were rehearsed, in between by a line."""
        known = self._rehearsed.get(length)
        if not known:
            return 1.0
        if rows in known:
            return known[rows]
        fewer, more = [n for n in known if n < rows], [n for n in known if n > rows]
        if not fewer or not more:
            return known[max(fewer) if fewer else min(more)]
        below, above = max(fewer), min(more)
        share = log2(rows / below) / log2(above / below)
        return known[below] + share * (known[above] - known[below])

    def _calls(self, rows: int, length: int) -> float:
        return self.verifying(rows, length) + self.proposing(rows, length)

    def verifying(self, rows: int, length: int) -> float:
        """The target's part of that."""
        return self._target(rows * (length + 1))

    def proposing(self, rows: int, length: int) -> float:
        """The draft's part of that."""
        return self._draft(2 * rows) + (length - 1) * self._draft(rows) if length else 0.0

    def catching_up(self, tokens: int) -> float:
        """Seconds for the draft to read so many tokens, as predicted."""
        return self._reading(tokens) if tokens else 0.0

    def _error(self, size: int, length: int) -> float:
        """How far predictions for such steps were off: for these, or else for those that are most like them."""
        own = self._medians.get((size, length))
        if own is not None:
            return own
        # Rounds of another length, then plain steps: of the batches whose size is nearest.
        kinds = [kind for kind in self._medians if kind[0] == size or not kind[1]]
        if not kinds:
            return 1.0
        nearest = min(kinds, key=lambda kind: (abs(kind[0] - size), not kind[1], abs(kind[1] - length)))
        return self._medians[nearest]


def size_class(rows: int) -> int:
    """Batches of like sizes: up to 1, 2, 4, 8, … rows."""
    return (rows - 1).bit_length()
