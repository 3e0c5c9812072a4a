"""Whether there is memory for one more row, and what gives way where rows grow beyond it."""

from __future__ import annotations

from collections.abc import Callable

from runner.engine.adapters.bank import AdapterBank
from runner.engine.batch import DecodeBatch
from runner.engine.memory import MemoryBudget, longest, open_ended
from runner.engine.prefix_cache import PrefixCache
from runner.engine.row import Row
from runner.errors import InvalidRequest, Unavailable


class Room:
    """The budget, seen with what takes of it. While it is `closed`, no row is taken up beside others."""

    def __init__(
        self,
        budget: MemoryBudget,
        batch: DecodeBatch,
        bank: AdapterBank,
        prefixes: PrefixCache,
        active: Callable[[], list[Row]],
    ) -> None:
        """`active` are the rows that are being prefilled."""
        self.closed = False
        self._budget = budget
        self._batch = batch
        self._bank = bank
        self._prefixes = prefixes
        self._active = active

    def require(self, row: Row) -> None:
        """Raises InvalidRequest where a row would not even fit alone, and Unavailable where that may change."""
        excess = self._budget.excess([row], self._bank.nbytes)
        if excess <= 0:
            return
        needs = f"{len(row.prompt)} tokens and the answer need {max(1, excess >> 20)} MiB more than"
        if self._budget.never([row], self._bank.nbytes):
            message = f"{needs} memory_limit leaves"
            raise InvalidRequest(message, param="max_tokens", code="memory_limit_exceeded")
        raise Unavailable(f"{needs} other models leave now", param="max_tokens", code="memory_full")

    def takes(self, row: Row, tokens: int, chunk: int) -> bool:
        """Whether there is memory for one more row, in a model call of so many tokens with those before it.

        What the batch has more room for than it needs, and then kept prefixes, are given up for a row if need be, but
        not for a call that is wider than that of a long prompt, which has `chunk` tokens.
        """
        rows = [*self._batch.rows, *self._active(), row]
        if self.closed and len(rows) > 1:
            return False
        # A row that joins others is there twice for a moment: in its own caches, and in theirs.
        twice = self._budget.caches([row]) if self._batch.rows else 0
        excess = self._excess(rows, int(twice))
        if excess > 0:
            excess -= self._prefixes.release(excess)
        wider = self._budget.working * max(0, tokens - chunk) // chunk
        # A row by itself was found to fit when it was submitted.
        return excess + (wider if self._budget.most else 0) <= 0 or len(rows) == 1

    def stay_within(self) -> None:
        """Spare room and kept prefixes give way to rows that grow, then the longest that asked for no length ends."""
        rows = [*self._batch.rows, *self._active()]
        excess = self._excess(rows)
        if excess > 0 and excess - self._prefixes.release(excess) > 0 and (row := open_ended(self._batch.rows)):
            row.max_tokens = min(row.max_tokens, len(row.generated) + 1)

    def soon(self, joining: list[Row], waiting: list[Row], most: int) -> int:
        """How many rows slots are made for beyond those that are `joining` now, of `most` in all.

        Those that are being prefilled; and those `waiting`, or as many as there are already, if there is memory for
        that as it is.
        """
        active = self._active()
        rows = [*self._batch.rows, *active]
        more = max(len(waiting), min(len(rows), most - len(rows)) if self._budget.most else 0)
        number, needed, sizes = len(rows) + more, longest([*rows, *waiting]), self._budget.sizes
        slots, tokens = self._batch.room_for(number, needed)
        room = max(slots, sizes.slots(number)), max(tokens, sizes.tokens(needed))
        fits = not self.closed and self._budget.has(*room, self._bank.nbytes + self._prefixes.nbytes)
        return len(active) - len(joining) + (more if fits else 0)

    def _excess(self, rows: list[Row], more: int = 0) -> int:
        """Bytes by which `rows`, and `more`, exceed the budget, once the batch has given up room that it can spare."""
        excess = self._budget.excess(rows, self._beside(rows) + more)
        if excess > 0 and self._batch.narrow():
            excess = self._budget.excess(rows, self._beside(rows) + more)
        return excess

    def _beside(self, rows: list[Row]) -> int:
        """Bytes of adapters, prefixes, and of what the batch has more room for than `rows` count with."""
        spare = self._taken(rows) - self._budget.caches(rows) if self._budget.most else 0
        return self._bank.nbytes + self._prefixes.nbytes + max(0, int(spare))

    def _taken(self, rows: list[Row]) -> float:
        """Bytes that the batch takes, once it has these rows where it then has other room: all is copied for that."""
        room = self._batch.room_for(len(rows), longest(rows))
        same = room == self._batch.room or not self._budget.sizes.few
        return self._batch.nbytes if same else self._budget.room(*room)
