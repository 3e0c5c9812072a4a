"""Speculation for one engine: what the loop asks between its steps."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Final

from runner.engine.row import Row
from runner.engine.speculative.costs import Costs
from runner.engine.speculative.policy import Acceptance, Policy
from runner.engine.speculative.proposer import Proposer

_REMEMBER: Final = 0.998
"""What earlier rounds of any row still count for, after another one, in what is assumed of new rows."""

_STEADY: Final = 2
"""Steps of a kind in a row before one is measured: what was started before the first of them may still be running."""


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
    ) -> None:
        self.weights_bytes = weights_bytes
        self.token_bytes = token_bytes
        self.proposer = proposer
        self.policy = Policy(costs)
        self._most = most
        self._known: defaultdict[str, Acceptance] = defaultdict(Acceptance)
        self._ended = time.perf_counter()
        self._before: tuple[int, int] | None = None
        self._alike = 0
        self._postponed = False
        self._accepted: list[Acceptance] = []

    def joined(self, rows: Sequence[Row]) -> None:
        """Rows are new in the batch: what is assumed of them is what others with their adapter had."""
        for row in rows:
            row.acceptance = Acceptance(prior=self._known[row.adapter_key].rate)
        self.disturbed()

    def decide(self, rows: Sequence[Row], most: int, *, changed: bool) -> int:
        """Tokens to propose in the next step, at most `most`."""
        changed = changed or self._postponed
        self._postponed = changed and any(len(row.prompt) + len(row.generated) + row.unread < 2 for row in rows)
        if self._postponed:
            return 0  # a round begins with the last two tokens of each row
        if changed:
            self._accepted = [row.acceptance for row in rows]
        most = most if self._most is None else min(most, self._most)
        return self.policy.decide(self._accepted, most, lambda: self.proposer.missed(rows), changed=changed)

    def disturbed(self) -> None:
        """Something else than steps takes time: what the steps under way take tells nothing."""
        self._alike = 0

    def ended(self, rows: int, length: int, following: int | None) -> None:
        """A step of `rows` rows and `length` proposals has been read; `following` proposals are under way for them.

        None where nothing is.
        """
        now = time.perf_counter()
        kind = (rows, length)
        self._alike = self._alike + 1 if kind == self._before else 1
        self.policy.took(rows, length, now - self._ended, steady=following == length and self._alike > _STEADY)
        self._ended, self._before = now, kind

    def learn(self, row: Row, kept: int, proposed: int) -> None:
        """A round kept so many of a row's proposals."""
        row.acceptance.add(kept, proposed)
        self._known[row.adapter_key].add(kept, proposed, _REMEMBER)
