"""Speculation for one engine: what the loop asks between its steps."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Final

from runner.engine.row import Row
from runner.engine.speculative.costs import Costs
from runner.engine.speculative.others import Work
from runner.engine.speculative.policy import Acceptance, Policy, Taken
from runner.engine.speculative.proposer import Proposer

_LAST: Final = 2
"""Tokens of each row that a round begins with: its last ones."""

_HEARD: Final = 5
"""Steps of a rehearsal that are timed."""

_REMEMBER: Final = 0.998
"""What earlier rounds of any row still count for, after another one, in what is assumed of new rows."""


class Speculation:
    """The proposer, and the decision how many tokens it proposes; both for the rows of the engine's one batch.

    `most` is the limit of caches whose windows can only take back so many tokens, None without such. `weights_bytes`
    and `token_bytes` are what the draft takes, and its caches for a token of a row.
    """

    def __init__(
        self,
        proposer: Proposer,
        costs: Costs,
        most: int | None = None,
        weights_bytes: int = 0,
        token_bytes: float = 0.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.weights_bytes = weights_bytes
        self.token_bytes = token_bytes
        self.proposer = proposer
        self.policy = Policy(costs)
        self._costs = costs
        self._most = most
        self._known: defaultdict[str, Acceptance] = defaultdict(Acceptance)
        self._clock = clock
        self._ended = clock()
        self._alone = False
        self._shared = 0
        self._warming = 0
        self._reading = self._building = 0.0
        self._work = Work()
        self._idle = False
        self._postponed = False
        self._short = False
        self._accepted: list[Acceptance] = []
        self._rehearsed: int | None = None
        self._heard: defaultdict[int, list[float]] = defaultdict(list)

    @contextmanager
    def rehearsing(self, length: int) -> Iterator[None]:
        """Every step proposes `length` tokens meanwhile, where it can; of it nothing is learnt but the time that steps
        take, and nothing charged.

        A first round compiles kernels, which takes what no round ever gains.
        """
        self._rehearsed = length
        try:
            yield
        finally:
            self._rehearsed = None
            for rows, heard in self._heard.items():
                if len(heard) >= _HEARD:
                    self._costs.rehearsed(rows, length, median(heard))
            self._heard.clear()
            self._ended = self._clock()

    @property
    def heard(self) -> int:
        """Rows of the largest batch of which enough steps of the rehearsal under way have been timed, 0 for none."""
        return max((rows for rows, heard in self._heard.items() if len(heard) >= _HEARD), default=0)

    def joined(self, rows: Sequence[Row], *, under_way: bool, first: bool = False) -> None:
        """Rows are new in the batch: what is assumed of them is what others with their adapter had.

        The `first` ones have found an empty one.
        """
        for row in rows:
            row.acceptance = Acceptance(prior=self._known[row.adapter_key].rate)
        self._idle = self._idle or first
        self._short = self._short or any(len(row.prompt) < _LAST for row in rows)
        self.disturbed(under_way=under_way, rows=len(rows))

    def decide(self, rows: Sequence[Row], most: int, *, changed: bool) -> int:
        """Tokens to propose in the next step, at most `most`."""
        changed = changed or self._postponed
        if changed and self._short:
            self._short = self._postponed = any(
                len(row.prompt) + len(row.generated) + row.unread < _LAST for row in rows
            )
            if self._postponed:
                return 0
        if self._rehearsed is not None:
            return min(self._rehearsed, most)
        if changed:
            self._accepted = [row.acceptance for row in rows]
        most = most if self._most is None else min(most, self._most)
        return self.policy.decide(self._accepted, most, lambda: self.proposer.missed(rows), changed=changed)

    def disturbed(self, *, under_way: bool, rows: int = 0, tokens: int = 0) -> None:
        """Something else than steps takes time: how long the next one takes tells nothing.

        Nor does the one that is `under_way`, if there is one: what the host does delays it, what the device does the
        next. It were so many `rows` that came or went, or `tokens` of prompts.
        """
        self._shared = max(self._shared, 1 + under_way)
        if rows or tokens:
            self._work += Work(rows, tokens)

    def catch_up(self, rows: Sequence[Row], *, under_way: bool) -> None:
        """Have the draft read what it has missed of `rows`."""
        self._reading += self._costs.catching_up(self.proposer.missed(rows))
        self._warming = max(self._warming, 1 + under_way)
        self.proposer.catch_up(rows)

    def built(self, seconds: float, *, under_way: bool) -> None:
        """Graphs were built for the next step, as they will not be for others of its kind."""
        self._warming = max(self._warming, 1 + under_way)
        self._building += seconds

    def ended(self, rows: int, length: int, tokens: float, following: int | None) -> None:
        """A step of `rows` rows and `length` proposals has been read, in which each row was given `tokens`, on average.

        `following` proposals are under way for them, None where nothing is.
        """
        now = self._clock()
        alone = self._alone and following is None
        # Else the host has begun what follows meanwhile: that has to be of the same kind, and so has what was before.
        usual = (alone and length > 0) or (following == length and not self._alone)
        timed = usual and not self._shared and not self._warming
        taken = Taken(
            *(rows, length, now - self._ended, tokens, following, timed),
            shared=self._shared > 0,
            reading=self._reading,
            building=self._building,
            alone=alone,
            work=self._work,
            idle=self._idle,
        )
        if self._rehearsed is None:
            self.policy.took(taken)
        elif timed and length == self._rehearsed:
            self._heard[rows].append(taken.seconds)
        self._alone = following is None
        self._ended, self._reading, self._building, self._work, self._idle = now, 0.0, 0.0, Work(), False
        self._shared, self._warming = max(0, self._shared - 1), max(0, self._warming - 1)

    def learn(self, row: Row, kept: int, proposed: int) -> None:
        """A round kept so many of a row's proposals."""
        if self._rehearsed is not None:
            return
        row.acceptance.add(kept, proposed)
        self._known[row.adapter_key].add(kept, proposed, _REMEMBER)
