"""What is done beside steps takes, in seconds: prompts that are computed, rows that join the batch or leave it.

A round among such work takes its own time and that of the work, and nobody can tell how much is which. So what a row
and a token of prompts take is learnt from plain steps: from how much longer those were that had some. What is begun in
one step may take its time in the next, which is why some steps are looked at together.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

_ROW: Final = 32
"""Tokens that a row which comes or goes is thought to take as long as, until it is seen."""

_TOGETHER: Final = 8
"""Steps, at most, if none is without others' work before."""

_KEPT: Final = 0.95
"""What they count for once there are as many again."""

_ENOUGH: Final = 3
"""Times that some steps were looked at, after which it is known."""

_DOUBT: Final = 0.1
"""How much it takes to believe that rows take longer or shorter beside tokens than was thought."""


class Work(msgspec.Struct, frozen=True):
    """Of others: `rows` that came or went, and `tokens` of prompts, padding included."""

    rows: int = 0
    tokens: int = 0

    def __add__(self, more: Work) -> Work:
        return Work(self.rows + more.rows, self.tokens + more.tokens)


class Others:
    """Learns how long work takes."""

    def __init__(self) -> None:
        self._work = Work()
        self._seconds = 0.0
        self._steps = 0
        self._times = 0
        # Sums of what was seen, and of its products: of rows, of tokens, of seconds.
        self._sums = (0.0, 0.0, 0.0)
        self._products = (0.0, 0.0, 0.0, 0.0, 0.0)
        self._each = (0.0, 0.0)

    @property
    def known(self) -> bool:
        """Whether enough has been seen."""
        return self._times >= _ENOUGH

    def learn(self, work: Work, seconds: float) -> None:
        """A plain step with so much work took `seconds` longer than others do; less than 0 if it was shorter."""
        self._work, self._seconds, self._steps = self._work + work, self._seconds + seconds, self._steps + 1
        if self._steps == _TOGETHER:
            self.settled()

    def settled(self) -> None:
        """A plain step without others' work has ended: what was begun before has taken all its time."""
        if self._work != Work():
            self._take(self._work.rows, self._work.tokens, self._seconds)
        self.dropped()

    def dropped(self) -> None:
        """A round has ended: what was begun before may take its time in that one."""
        self._work, self._seconds, self._steps = Work(), 0.0, 0

    def seconds(self, work: Work) -> float:
        """That so much work takes."""
        row, token = self._each
        return row * work.rows + token * work.tokens

    def _take(self, r: float, t: float, s: float) -> None:
        self._times += 1
        self._sums = _decayed(self._sums, (r, t, s))
        self._products = _decayed(self._products, (r * r, r * t, t * t, r * s, t * s))
        rows, tokens, seconds = self._sums
        token = max(0.0, seconds) / (_ROW * rows + tokens)
        self._each = self._fitted(_ROW * token, token)

    def _fitted(self, row: float, token: float) -> tuple[float, float]:
        """Seconds of a row and of a token: least squares, drawn towards what is thought."""
        rr, rt, tt, rs, ts = self._products
        rs, ts, rr, tt = rs + _DOUBT * rr * row, ts + _DOUBT * tt * token, (1 + _DOUBT) * rr, (1 + _DOUBT) * tt
        if not rr or not tt:
            return row, token
        determinant = rr * tt - rt * rt
        row, token = (rs * tt - ts * rt) / determinant, (ts * rr - rs * rt) / determinant
        if row < 0:
            return 0.0, max(0.0, ts / tt)
        return (row, token) if token >= 0 else (max(0.0, rs / rr), 0.0)


def _decayed(sums: tuple[float, ...], more: tuple[float, ...]) -> Any:
    return tuple([_KEPT * old + new for old, new in zip(sums, more, strict=True)])
