"""How much room rows get in the caches' arrays: slots, and tokens of each.

Where graphs are kept, each size of the arrays has graphs of its own, and one costs the host as much as five or six
steps: so there are few sizes, which do not depend on the way by which a batch has come to its rows, and a row gets room
up to its end at once. A launch reads what is there and no more, so that room costs memory alone. Elsewhere an operation
may read all of it: there it grows with the rows, by steps.
"""

from __future__ import annotations

from typing import Final

import msgspec

_EIGHT: Final = 8
"""Rows that graphs are made for a multiple of, from as many on."""

_STEP: Final = 256
"""Tokens that room grows by at least. MLX's CUDA backend takes cuDNN only for multiples of it."""


class Sizes(msgspec.Struct, frozen=True):
    """With `few`, sizes are few."""

    few: bool = False

    def tokens(self, needed: int, had: int = 0) -> int:
        """Tokens to have room for where `needed` need some, which `had` too little.

        Of a few sizes, there are four between a power of two and the next, from 1,024 on.
        """
        if self.few:
            step = max(_STEP, 1 << max(0, (needed - 1).bit_length() - 3))
            return -(-needed // step) * step
        return -(-max(needed, had + had // 8) // _STEP) * _STEP

    def slots(self, rows: int, had: int = 0) -> int:
        """Slots to have for `rows` rows: a third more than there were, so that joining seldom copies a batch.

        Of a few sizes, one that rows come to which join one by one. At most a third more than there are rows.
        """
        if not self.few:
            return grown(had, rows)
        slots = 1
        while slots < rows:
            slots = grown(slots, slots + 1)
        return slots

    def kept(self, had: int, needed: int) -> int:
        """What to have where all is copied anyhow: as much as there `had` been, unless it is twice what is needed."""
        return had if needed <= had <= 2 * needed else needed


AS_NEEDED: Final = Sizes()
FEW: Final = Sizes(few=True)


def rounded(rows: int) -> int:
    """A power of two up to eight rows, then a multiple of eight."""
    return 1 << max(0, rows - 1).bit_length() if rows <= _EIGHT else -(-rows // _EIGHT) * _EIGHT


def grown(slots: int, rows: int) -> int:
    """Slots to have when `rows` rows need one."""
    return slots if rows <= slots else max(rows, slots + slots // 3)
