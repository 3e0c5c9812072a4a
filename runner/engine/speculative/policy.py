"""How many tokens to propose next, 0 for none: whatever is expected to give the most tokens a second.

What a round gives follows from how often proposals were accepted lately, row by row; what it costs, from `costs.py`.
While nothing is proposed neither can be learned, so a little of the time that plain steps take is set aside for trying
again; and while something is, a plain step now and then keeps the comparison honest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from runner.engine.speculative.costs import Costs

_PRIOR: Final = 0.8
"""Acceptance of a draft of which nothing is known yet."""

_PRIOR_WEIGHT: Final = 4.0
"""Proposals that what is known of other rows counts as, for a new one."""

_FORGET: Final = 0.95
"""What a row's earlier rounds still count for after another one."""

_TURN_ON: Final = 1.05
_CHANGE: Final = 1.02
"""Gains below which plain steps, or the present length, are kept."""

_DECIDE_EVERY: Final = 8
"""Steps of the same rows between two decisions."""

_LOOK_AFTER: Final = 4
"""Steps after a change until the next decision: the first thing to learn is whether it was right."""

_SPARE: Final = 0.01
"""Share of the time that may be lost to trying."""

_TRIAL: Final = 6
"""Rounds of a trial: the first two are not measured, as the steps before and after are of another kind."""

_PAYS_BACK: Final = 32
"""Steps over which the draft's reading of what it has missed has to be worth it."""

_PLAIN_EVERY: Final = 128
_PLAIN_STEPS: Final = 4
"""Rounds between two looks at what plain steps cost, and how many of them it takes."""


@dataclass(slots=True)
class Acceptance:
    """How often a row's proposals were accepted, given that those before were: recent rounds count most.

    `kept` and `refused` are decayed counts, on top of `prior`, the rate that is assumed before there are any.
    """

    prior: float = _PRIOR
    kept: float = 0.0
    refused: float = 0.0

    @property
    def rate(self) -> float:
        """Probability that the next proposal is accepted."""
        return (self.kept + self.prior * _PRIOR_WEIGHT) / (self.kept + self.refused + _PRIOR_WEIGHT)

    def add(self, kept: int, proposed: int, forget: float = _FORGET) -> None:
        """A round kept the first `kept` of `proposed` tokens. What came after a refusal was not looked at."""
        self.kept = self.kept * forget + kept
        self.refused = self.refused * forget + (kept < proposed)


def expected_tokens(rate: float, length: int) -> float:
    """Tokens that a round of `length` proposals gives a row, the one of the target's own included."""
    return float(length + 1) if rate >= 1 else (1 - rate ** (length + 1)) / (1 - rate)


class Policy:
    """Decides for one engine. `tried` is how many trials there were, for whoever wonders."""

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        self.tried = 0
        self._length = 0
        self._settled = 0
        self._pending: tuple[int, int] | None = None
        self._trial = (1, 0.0)
        self._spare = 0.0
        self._since_plain = 0

    def decide(self, rows: Sequence[Acceptance], most: int, missed: Callable[[], int], *, changed: bool) -> int:
        """Tokens to propose in the next step of `rows`, at most `most`.

        `missed` counts the tokens that the draft would have to read first. `changed` says that they are other rows than
        in the step before.
        """
        if most == 0 or not rows:
            self._length, self._pending = 0, None
            return 0
        if self._pending is not None:
            length, left = self._pending
            self._pending = (length, left - 1) if left > 1 else None
            return min(length, most)
        if changed or self._length > most or self._settled <= 0:
            before, self._length = self._length, self._best(rows, most, missed())
            self._settled = _DECIDE_EVERY if self._length == before else _LOOK_AFTER
            if self._length == 0:
                self._trial = self._worst_trial(rows, most, missed())
        self._settled -= 1
        return self._try(most) if self._length == 0 else self._compare()

    def took(self, rows: int, length: int, seconds: float, *, steady: bool) -> None:
        """A step ended. `steady` says that its time is its own: nothing else was done, and the next is of its kind."""
        if steady:
            self.costs.record(rows, length, seconds)
        if length == 0:
            self._spare += seconds * _SPARE
        else:
            self._since_plain += 1

    def _best(self, rows: Sequence[Acceptance], most: int, missed: int) -> int:
        present = min(self._length, most)
        plain = self._rate(rows, 0, 0)
        # Bad news first, as it is what large batches get: nothing is worked out row by row for them.
        if all((length + 1) * len(rows) / self._cost(rows, length, missed) < plain for length in range(1, most + 1)):
            return 0
        rates = [plain, *(self._rate(rows, length, missed) for length in range(1, most + 1))]
        best = max(range(most + 1), key=rates.__getitem__)
        needed = _CHANGE if present else _TURN_ON
        return best if rates[best] > rates[present] * needed else present

    def _rate(self, rows: Sequence[Acceptance], length: int, missed: int) -> float:
        """Tokens a second."""
        tokens = sum(expected_tokens(row.rate, length) for row in rows) if length else float(len(rows))
        return tokens / self._cost(rows, length, missed)

    def _cost(self, rows: Sequence[Acceptance], length: int, missed: int) -> float:
        once = self.costs.catching_up(missed) / _PAYS_BACK if length else 0.0
        return self.costs.step(len(rows), length) + once

    def _worst_trial(self, rows: Sequence[Acceptance], most: int, missed: int) -> tuple[int, float]:
        """The length that looks best, and the seconds that are lost to trying it if every proposal is refused."""
        count = len(rows)
        length = max(range(1, most + 1), key=lambda length: self._rate(rows, length, missed))
        lost = _TRIAL * (self.costs.step(count, length) - self.costs.step(count, 0))
        return length, lost + self.costs.catching_up(missed)

    def _try(self, most: int) -> int:
        """A trial, if enough time was set aside for it."""
        length, lost = self._trial
        if self._spare < lost or length > most:
            return 0
        self._spare = 0.0
        self.tried += 1
        self._pending = (length, _TRIAL - 1)
        self._settled = 0
        return length

    def _compare(self) -> int:
        if self._since_plain < _PLAIN_EVERY:
            return self._length
        self._since_plain = 0
        self._settled = 0
        self._pending = (0, _PLAIN_STEPS - 1)
        return 0
