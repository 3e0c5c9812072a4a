"""How many tokens to propose next, 0 for none: whatever has been found to give the most tokens a second.

What a round gives follows from how often proposals were accepted lately, row by row; what steps cost is what they took,
by the size of the batch and the number of proposals (`costs.py`). Only two numbers of proposals are ever considered:
each is graphs of its own. One that was never timed is tried, the likelier of the two first, until a few rounds of it
have been; one that did not pay is tried again now and then. What that may cost is limited (`allowance.py`), and so is
what rounds may lose that were expected to pay. A plain step is timed first, and now and then, for everything is
measured by it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from runner.engine.speculative.allowance import Allowance
from runner.engine.speculative.costs import ENOUGH, Costs, size_class
from runner.engine.speculative.others import Others, Work

_PRIOR: Final = 0.8
"""Acceptance of a draft of which nothing is known yet."""

_PRIOR_WEIGHT: Final = 4.0
"""Proposals that what is known of other rows counts as, for a new one."""

_FORGET: Final = 0.95
"""What a row's earlier rounds still count for after another one."""

_TRIED_AGAIN: Final = 0.25
"""And when a trial begins, which is to find out how it is now."""

_TURN_ON: Final = 1.05
_CHANGE: Final = 1.02
"""Gains below which plain steps, or the present length, are kept."""

_DECIDE_EVERY: Final = 8
"""Steps of the same rows between two decisions; and of others, where many rows take plain steps: to look at each of
them takes a tenth of a step."""

_FEW: Final = 8
"""Rows of which it is decided anew whenever they have changed."""

_TRIAL: Final = 7
"""Rounds that a trial takes where nothing has to be built; those at both of its ends are not timed."""

_TRIAL_MOST: Final = 14
"""And at most: the first ones build graphs."""

_SAVED_FOR_ROUNDS: Final = 8.0
_SAVED_FOR_READING: Final = 20.0
"""Plain steps' time that is enough to begin any trial: one that takes more ends when the allowance does."""

_RETRY: Final = 16
_RETRY_MOST: Final = 1024
"""Plain steps between trials of batches of a size: twice as many after each that did not pay."""

_PAYS_BACK: Final = 32
"""Steps over which the draft's reading of what it has missed has to be worth it."""

_PLAIN_FIRST: Final = 32
_PLAIN_EVERY: Final = 256
_PLAIN_STEPS: Final = 6
"""Rounds until the first look at what plain steps cost now, and, in the end, between two; how many of them it takes."""


class Acceptance(msgspec.Struct):
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
        self.fade(forget)
        self.kept += kept
        self.refused += kept < proposed

    def fade(self, forget: float) -> None:
        """Earlier rounds count for less."""
        self.kept *= forget
        self.refused *= forget


def expected_tokens(rate: float, length: int) -> float:
    """Tokens that a round of `length` proposals gives a row, the one of the target's own included."""
    return float(length + 1) if rate >= 1 else (1 - rate ** (length + 1)) / (1 - rate)


class Taken(msgspec.Struct, frozen=True):
    """A step that has ended, of `rows` rows and `length` proposals, and the `seconds` since the one before it ended.

    It gave each row `tokens` on the average. `following` proposals are under way, None where nothing is. A `timed` one
    took what such steps take. With `shared`, somebody else's work was done as well: so much `work` (`others.py`), and
    after an `idle` time if there was one. `reading` are seconds in which the draft caught up, as predicted, `building`
    those in which graphs were built for the step that follows. An `alone` one was begun when the one before it had been
    read, and read before another was begun: nothing follows, and what was read or built was for itself.
    """

    rows: int
    length: int
    seconds: float
    tokens: float
    following: int | None
    timed: bool = True
    shared: bool = False
    reading: float = 0.0
    building: float = 0.0
    alone: bool = False
    work: Work = Work()
    idle: bool = False

    @property
    def for_length(self) -> int | None:
        """Proposals of the step that `reading` and `building` were for; None where there is none."""
        return self.length if self.alone else self.following


class _Trial(msgspec.Struct):
    size: int
    length: int
    left: int = _TRIAL_MOST
    timed: int = 0
    building: float = 0.0
    """Seconds of building for the last round: the next may need as much."""


class Policy:
    """Decides for one engine. `tried` counts trials, `steps` the steps that were, by size class and length."""

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        self.allowance = Allowance()
        self.others = Others()
        self.tried = 0
        self.steps: Counter[tuple[int, int]] = Counter()
        self._length = 0
        self._settled = 0
        self._size: int | None = None
        self._plain_left = 0
        self._wanted = 0.0
        self._builds: dict[int, float] = {}
        self._trial: _Trial | None = None
        self._gaps: defaultdict[int, int] = defaultdict(int)
        self._since_trial: Counter[int] = Counter()
        self._since_plain: Counter[int] = Counter()
        self._plain_after: defaultdict[int, int] = defaultdict(lambda: _PLAIN_FIRST)

    def decide(self, rows: Sequence[Acceptance], most: int, missed: Callable[[], int], *, changed: bool) -> int:
        """Tokens to propose in the next step of `rows`, at most `most`.

        `missed` counts the tokens that the draft would have to read first. `changed` says that they are other rows than
        in the step before.
        """
        if most == 0 or not rows:
            self._length, self._trial, self._settled = 0, None, 0
            return 0
        size = size_class(len(rows))
        if self._trial is not None and not self._goes_on(self._trial, size, most):
            self._trial, self._settled = None, 0
        if self._trial is not None:
            return self._next(size)
        if self._plain_left > 0 or not self.costs.known(len(rows), 0):
            self._plain_left = max(0, self._plain_left - 1)
            self._settled = 0
            return 0
        changed = changed and (bool(self._length) or len(rows) <= _FEW)
        spent = bool(self._length) and self.allowance.spent
        if self._settled <= 0 or changed or self._size != size or self._length > most or spent:
            self._settled, self._size = _DECIDE_EVERY, size
            if self._settle([row.rate for row in rows], most, missed()):
                for row in rows:
                    row.fade(_TRIED_AGAIN)
        self._settled -= 1
        return self._next(size)

    def took(self, step: Taken) -> None:
        """A step has ended."""
        size = size_class(step.rows)
        self.steps[size, step.length] += 1
        if step.timed:
            self.costs.record(step.rows, step.length, step.seconds)
            if self._trial is not None and (self._trial.size, self._trial.length) == (size, step.length):
                self._trial.timed += 1
        elif step.length and step.for_length == step.length and not step.idle:
            self._record_disturbed(step)
        (self._since_plain if step.length else self._since_trial)[size] += 1
        if step.building and (built := step.for_length) is not None:
            self._builds[built] = step.building / self.costs.step(step.rows, built)
        if self._trial is not None:
            self._trial.building = step.building if step.for_length else 0.0
        if self.costs.known(step.rows, 0):
            plain = self.costs.average(step.rows)
            self._learn_of_others(step, plain)
            self.allowance.begin(plain)
            # Of what others did, or of a time without requests, nothing is saved up.
            self.allowance.passed(plain if step.shared else step.seconds)
            if step.length or step.following:
                self.allowance.charge(self._lost(step, plain))
            self.allowance.cap(plain, self._wanted)

    def _lost(self, step: Taken, plain: float) -> float:
        """Seconds beyond those that plain steps, of `plain` seconds, take for as many tokens.

        What is done for a round while the plain step before it is waited for is part of it. Of one that nothing follows
        on, some of the time may have gone by before the one before it was read.
        """
        if step.for_length is not None:
            if not step.shared:
                return step.seconds - step.tokens * plain
            if not step.idle and self.others.known:
                # Whatever was expected of rounds: where rows come and go all the time, they are charged with what is.
                return step.seconds - self.others.seconds(step.work) - step.tokens * plain
        rounds = self.costs.step(step.rows, step.length) - step.tokens * plain if step.length else 0.0
        return rounds + (step.reading + step.building if step.for_length else 0.0)

    def _learn_of_others(self, step: Taken, plain: float) -> None:
        if step.length or step.following or step.idle:
            self.others.dropped()
        elif step.shared:
            self.others.learn(step.work, step.seconds - plain)
        elif step.timed:
            self.others.settled()

    def _record_disturbed(self, step: Taken) -> None:
        if step.shared and self.others.known:
            alone = step.seconds - self.others.seconds(step.work) - step.reading - step.building
            self.costs.record_among_others(step.rows, step.length, alone)
        else:
            self.costs.record_disturbed(step.rows, step.length, step.seconds)

    # ------------------------------------------------------------- what pays

    def _settle(self, rows: Sequence[float], most: int, missed: int) -> bool:
        """Decide anew, by the rates of `rows`: how many from now on, and, as is returned, whether to try another number
        first."""
        known = [length for length in lengths(most) if self.costs.known(len(rows), length)]
        unknown = [length for length in lengths(most) if length not in known]
        spent = self.allowance.spent
        rates = {length: self._rate(rows, length, missed) for length in (0, *(() if spent else known))}
        present = self._length if self._length in rates else 0
        best = max(rates, key=rates.__getitem__)
        if best and rates[best] < rates[present] * (_CHANGE if present else _TURN_ON):
            best = present
        self._length = best
        if best:
            # What was never timed is tried where it would be better; there is nothing else to be found.
            unknown = [length for length in unknown if self._rate(rows, length, missed) > rates[best] * _CHANGE]
            self._gaps[size_class(len(rows))] = _RETRY
        if not spent and (candidates := unknown or ([] if best else known)):
            return self._try(rows, max(candidates, key=lambda length: self._rate(rows, length, missed)), missed)
        return False

    def _rate(self, rows: Sequence[float], length: int, missed: int) -> float:
        """Tokens a second."""
        once = self.costs.catching_up(missed) / _PAYS_BACK if length else 0.0
        return _tokens(rows, length) * len(rows) / (self.costs.step(len(rows), length) + once)

    # ------------------------------------------------------------- trials

    def _try(self, rows: Sequence[float], length: int, missed: int) -> bool:
        """Begin a trial, if it is time, and it can be afforded; returns whether it is so."""
        size, plain = size_class(len(rows)), self.costs.step(len(rows), 0)
        if not self._length and self._since_trial[size] < self._gaps[size]:
            return False
        lost = _TRIAL * max(0.0, self.costs.step(len(rows), length) - _tokens(rows, length) * plain)
        reading = self.costs.catching_up(missed)
        self._wanted = min(lost, _SAVED_FOR_ROUNDS * plain) + min(reading, _SAVED_FOR_READING * plain)
        self._wanted += self._building(len(rows), length)
        if self.allowance.seconds < self._wanted:
            return False
        self._wanted = 0.0
        self.tried += 1
        self._trial = _Trial(size, length)
        self._since_trial[size], self._gaps[size] = 0, max(_RETRY, self._gaps[size])
        return True

    def _building(self, rows: int, length: int) -> float:
        """Seconds that building graphs may take in the first round of a length, by the last that were built.

        In units of the steps themselves, since a round has more of them.
        """
        if self.costs.known(rows, length) or not self._builds:
            return 0.0
        return self._builds.get(length, max(self._builds.values())) * self.costs.step(rows, length)

    def _goes_on(self, trial: _Trial, size: int, most: int) -> bool:
        trial.left -= 1
        if trial.size == size and trial.length <= most:
            if trial.timed < ENOUGH and trial.left > 0 and self.allowance.seconds >= trial.building:
                return True
            had = 1.0
        else:
            had = min(1.0, (_TRIAL_MOST - trial.left) / _TRIAL)
        # Whether it could be timed or not: unless it has found something, the next one is as far off again, or, after
        # one that the size of the batch has ended, by as much of that as there was of it.
        self._gaps[trial.size] = min(round((1 + had) * max(_RETRY, self._gaps[trial.size])), _RETRY_MOST)
        return False

    def _next(self, size: int) -> int:
        """The present length, or a plain step where it is long ago that one was timed."""
        if self._trial is not None:
            return self._trial.length
        if not self._length or self._since_plain[size] < self._plain_after[size]:
            return self._length
        self._since_plain[size], self._plain_after[size] = 0, min(2 * self._plain_after[size], _PLAIN_EVERY)
        self._plain_left = _PLAIN_STEPS - 1
        return 0


def lengths(most: int) -> tuple[int, ...]:
    """Numbers of proposals that are considered."""
    return (most, most // 2) if most > 1 else (1,)


def _tokens(rows: Sequence[float], length: int) -> float:
    """Tokens that a row is expected to get from a step, on the average, by the rate of each."""
    return sum([expected_tokens(rate, length) for rate in rows]) / len(rows) if length else 1.0
