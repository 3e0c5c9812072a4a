"""Model calls on prompts: of several that share one, and of one that takes several."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from runner.engine.adapters.layers import RowSlots
from runner.engine.arrays import start
from runner.engine.kv.caches import Caches
from runner.engine.row import Row
from runner.engine.traced import TracedCalls


class Call:
    """A model call on prompts, of which layers are started one after the other."""

    def __init__(self, rows: list[Row], caches: Caches, tokens: int, prompts: float) -> None:
        """The call is built into the `caches`; it has so many `tokens`, padding included, of so many `prompts`."""
        self.rows = rows
        self.prompts = prompts
        self.caches = caches
        self.tokens = tokens
        self.layers = len(caches.by_layer)
        self._next = 0

    def start(self, layers: int) -> None:
        """Start computing what so many more layers write."""
        start(self.caches.by_layer[self._next : self._next + layers])
        self._next += layers
        if self.started:
            self.caches.dispatched()

    @property
    def left(self) -> int:
        """Layers that are not started."""
        return self.layers - self._next

    @property
    def started(self) -> bool:
        """Whether all of it is."""
        return self._next >= self.layers


class LongPrompt:
    """A prompt that is prefilled by itself, in as many calls as it takes."""

    def __init__(self, row: Row, caches: Caches) -> None:
        """`caches` hold the first `row.cached` tokens."""
        self.row = row
        self.caches = caches
        self.todo = row.prompt[row.cached : -1]
        self._whole = len(self.todo)

    def call(self, call: TracedCalls, slots: RowSlots | None, chunk: int, width: Callable[[Caches, int], int]) -> Call:
        """The next `chunk` tokens, of which `width` says how wide a call they are to be in these caches."""
        # The chunk before has to be done: the host is never more than one ahead, and a cancel costs one at most.
        mx.eval(self.caches.arrays)
        tokens, self.todo = self.todo[:chunk], self.todo[chunk:]
        padding = width(self.caches, len(tokens)) - len(tokens)
        call(self.caches, mx.array([tokens + [0] * padding]), slots, [len(tokens)])
        return Call([self.row], self.caches, len(tokens) + padding, len(tokens) / self._whole)
