"""What a deployment takes in memory, as numbers. Apart from their arithmetic, so that a runner holds none of it."""

from __future__ import annotations

from typing import Final, NamedTuple

STEP: Final = 256
"""Tokens by which upstream's caches grow."""


def slots(rows: int) -> int:
    """Rows that a batch has room for once `rows` have joined it one by one: it grows by a third at a time
    (`runner.engine.kv.sizes`)."""
    held = 1
    while held < rows:
        held = max(held + 1, held + held // 3)
    return held


def whole_steps(tokens: int) -> int:
    """Tokens that a row with so many has room for."""
    return -(-tokens // STEP) * STEP


class ModelMemory(NamedTuple):
    """Bytes of one deployment.

    `draft` are the draft model's weights; its caches are counted with the model's own. `kv_per_token` is what a token
    adds to a row that grows, `kv_row` a row of `context` tokens (0: nothing says how long it can be, and it is one
    prefill step); `rows` is how many there can be. `prefill` is the peak of a prefill step at the end of such a row,
    beside everything else; `first` is what one request takes, caches and all, while its first step is computed.
    `exact` is False where the architecture is not known, and the terms are guesses.
    """

    weights: int = 0
    adapters: int = 0
    draft: int = 0
    kv_per_token: int = 0
    kv_row: int = 0
    rows: int = 0
    context: int = 0
    prefix_cache: int = 0
    prefill: int = 0
    first: int = 0
    exact: bool = True

    @property
    def held(self) -> int:
        """What is there as soon as the model is loaded, requests or not."""
        return self.weights + self.adapters + self.draft

    @property
    def least(self) -> int:
        """With one short request: with less, nothing can ever be answered."""
        return self.held + self.first

    def working(self, step: int) -> int:
        """What computing the first step of `step` tokens takes, beside what it leaves in the caches."""
        return max(0, self.first - self.kv_per_token * whole_steps(min(step, self.context or step)))

    @property
    def kv_max(self) -> int:
        """Every row at its longest, with what the batch has of room beyond them."""
        return self.kv_row * slots(self.rows)

    @property
    def most(self) -> int:
        """Everything at once: every row at its longest, and the prefix cache full."""
        return self.held + self.kv_max + self.prefix_cache + self.prefill

    def rows_within(self, limit: int) -> int:
        """How many rows can be at their longest within so many bytes; the prefix cache gives way to them."""
        room = limit - self.held - self.prefill
        if not self.kv_row:
            return self.rows
        at_once = max(0, min(self.rows, room // self.kv_row))
        while at_once and slots(at_once) * self.kv_row > room:
            at_once -= 1
        return at_once

    def context_within(self, limit: int, rows: int = 1) -> int:
        """How long each of so many rows can be at once within so many bytes, in tokens."""
        if not self.kv_per_token:
            return self.context
        fixed = self.kv_row - self.kv_per_token * whole_steps(self.context)
        room = (limit - self.held - self.prefill) // slots(rows) - fixed
        return max(0, min(self.context, room // self.kv_per_token // STEP * STEP))
