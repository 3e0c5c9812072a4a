"""From which length on rows are seen packed, where they are not from their first token on.

mlx_lm's `quantized_kv_start` turns a whole cache at the end of the call that has passed it, so that what a prompt comes
to depends on its chunks. Here each query chooses by its own position: before the threshold it sees plain keys and
values only, from it on packed ones only, its own included. A row then says in any chunks and in any batch what it says
alone. A row packs its first tokens in the call in which it may come to the threshold, and never if it stays below.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence


class Phase(enum.IntEnum):
    """On which side of the threshold the queries of a call are."""

    BEFORE = 0
    ACROSS = 1
    AFTER = 2


class Threshold:
    """Position `start`, the first that sees packed keys, and which of `rows` rows have their beginnings packed."""

    def __init__(self, start: int, rows: int) -> None:
        self.start = start
        self.phase = Phase.BEFORE
        self.turning: list[int] = []
        """Rows whose beginnings are to be packed before the call under way."""
        self._packed = [False] * rows
        self._reaching = self._packed

    def begin(self, most: Sequence[int], least: int, count: int) -> None:
        """A call of `count` tokens a row starts; rows have `most` tokens at most, and all of them `least` at least.

        Padding counts: a row that only pads to the threshold is packed too early, which is no matter.
        """
        self._reaching = [length + count > self.start for length in most]
        self.turning = [
            row
            for row, (reaches, packed) in enumerate(zip(self._reaching, self._packed, strict=True))
            if reaches and not packed
        ]
        if not any(self._reaching):
            self.phase = Phase.BEFORE
        else:
            self.phase = Phase.AFTER if least >= self.start else Phase.ACROSS

    def end(self) -> None:
        """The call is built. Who was not in reach of the threshold has not been written to what is packed: a row that
        was cut back is packed anew when it comes there again."""
        self._packed, self.turning = self._reaching, []

    def restart(self, rows: int) -> None:
        """So many others, in the place of all."""
        self._packed = self._reaching = [False] * rows

    def extend(self, other: Threshold) -> None:
        """Rows of `other` come after these."""
        self._packed = self._packed + other._packed

    def take(self, order: Sequence[int]) -> None:
        """Only the rows `order` stay, as it lists them."""
        self._packed = [self._packed[row] for row in order]
