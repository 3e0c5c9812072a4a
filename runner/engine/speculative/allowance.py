"""What speculation may cost: a share of the time, saved up before it is spent.

Rounds are charged with what they took beyond what plain steps take for the same tokens, whatever the reason: proposals
that were refused, a draft that had to read first, graphs that had to be built. So however wrong all expectations are,
decoding with a draft loses no more than the share, what it begins with, and what the one round costs that overdraws it.
"""

from __future__ import annotations

from typing import Final

_SHARE: Final = 0.0125
"""Of all time."""

_FIRST: Final = 10.0
_MOST: Final = 32.0
"""Plain steps: what there is to begin with, and what is saved up or kept of what was gained."""


class Allowance:
    """Seconds that may be lost to rounds that do not pay, less than 0 where that many have to be made up for."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._begun = False

    @property
    def spent(self) -> bool:
        """Whether rounds have to wait."""
        return self.seconds < 0

    def begin(self, plain: float) -> None:
        """It is known that a plain step takes so many seconds. Only the first time counts."""
        if not self._begun:
            self._begun = True
            self.seconds += _FIRST * plain

    def passed(self, seconds: float) -> None:
        """So much time has gone by."""
        self.seconds += _SHARE * seconds

    def charge(self, seconds: float) -> None:
        """A round has lost so much, or gained it where that is less than 0."""
        self.seconds -= seconds

    def cap(self, plain: float, wanted: float) -> None:
        """Forget what is beyond some plain steps, of `plain` seconds, and the seconds that are `wanted`.

        A good time does not pay for a bad one that is as long.
        """
        self.seconds = min(self.seconds, max(_MOST * plain, wanted))
