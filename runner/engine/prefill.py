"""Prompts on their way into the batch: everything but their last token, at most one chunk a step.

Prompts that fit into one chunk together are prefilled together, padded on the right: a model call costs little more
for several. A longer prompt is prefilled alone, chunk by chunk, so that rows which decode wait for one chunk at most.
The last token is left to the first decode step, so no logits of a prompt are ever computed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx

from runner.engine.adapters.bank import AdapterBank
from runner.engine.arrays import start
from runner.engine.batch import Caches
from runner.engine.prefix_cache import PrefixCache
from runner.engine.row import Row

Ready = tuple[list[Row], Caches]
"""Rows and their merged caches, for the batch to take."""


class Prefiller:
    """The waiting queue, first come first served, and the rows that are being prefilled.

    `active` rows have left the queue and have not joined the batch.
    """

    def __init__(
        self,
        model: Any,
        bank: AdapterBank,
        prefixes: PrefixCache,
        new_cache: Callable[[], Caches],
        has_room: Callable[[Row], bool],
    ) -> None:
        """`new_cache` makes empty caches for a row; `has_room` says whether memory has room for one more."""
        self.waiting: deque[Row] = deque()
        self.active: list[Row] = []
        self._model = model
        self._bank = bank
        self._prefixes = prefixes
        self._new_cache = new_cache
        self._has_room = has_room
        self._long: _LongPrompt | None = None
        self._others_turn = False

    @property
    def rows(self) -> list[Row]:
        """Every row that has not joined the batch."""
        return [*self.waiting, *self.active]

    def remove_ended(self) -> list[Row]:
        """Forget the rows that are done, and return them."""
        ended = [row for row in self.rows if row.done]
        if ended:
            self.waiting = deque(row for row in self.waiting if not row.done)
            self.active = [row for row in self.active if not row.done]
            if self._long is not None and self._long.row.done:
                self._long = None
        return ended

    def abandon(self) -> list[Row]:
        """Give up what is being prefilled, after a failure; returns its rows."""
        rows, self.active, self._long = self.active, [], None
        return rows

    def step(self, free_rows: int, chunk: int) -> Iterator[Ready]:
        """Start one model call of at most `chunk` tokens, without waiting for it; yields the rows that it makes ready.

        The consumer lets them join the batch before it asks for more.
        """
        for ready in self._advance(free_rows, chunk):
            yield ready
            self.active = [row for row in self.active if row not in ready[0]]

    def _advance(self, free_rows: int, chunk: int) -> Iterator[Ready]:
        # Prompts that fit into one call need not wait for all the calls of a long one: they take turns with it.
        self._others_turn = not self._others_turn
        long = self._long
        if long is None or self._others_turn:
            group = self._take(free_rows - len(self.active), chunk)
            if group:
                yield from self._start(group)
                if self._long is long:
                    return
        if self._long is not None:
            yield from self._continue(self._long, chunk)

    def _take(self, free_rows: int, chunk: int) -> list[tuple[Row, Caches]]:
        """The first rows of the queue whose tokens fit into one call together, with what is known of their prompts.

        The first may be longer than a call, unless a long prompt is under way: it is then alone.
        """
        group: list[tuple[Row, Caches]] = []
        longest = 0
        while self.waiting and len(group) < free_rows:
            row = self.waiting[0]
            caches = self._look_up(row)
            longest = max(longest, row.uncached)
            if longest * (len(group) + 1) > chunk and (group or self._long is not None):
                break
            if not self._has_room(row):
                break
            self.active.append(self.waiting.popleft())
            group.append((row, caches))
        return group

    def _start(self, group: list[tuple[Row, Caches]]) -> Iterator[Ready]:
        if whole := [(row, caches) for row, caches in group if not row.uncached]:
            yield [row for row, _ in whole], merge([caches for _, caches in whole])
        rest = [(row, caches) for row, caches in group if row.uncached]
        if len(rest) == 1 and self._long is None:
            self._long = _LongPrompt(*rest[0])
        elif rest:
            rows = [row for row, _ in rest]
            yield rows, self._call_together(rows, [caches for _, caches in rest])

    def _continue(self, long: _LongPrompt, chunk: int) -> Iterator[Ready]:
        self._apply_adapters([long.row])
        long.call(self._model, chunk)
        if not long.todo:
            self._long = None
            if long.row.reusable:
                # Merging copies, so the prompt's own caches can be kept as they are.
                self._prefixes.store(long.row.adapter_key, long.row.prompt[:-1], long.caches)
            yield [long.row], merge([long.caches])

    def _look_up(self, row: Row) -> Caches:
        hit = self._prefixes.fetch(row.adapter_key, row.prompt)
        if hit is None:
            row.cached = 0
            return self._new_cache()
        caches, row.cached = hit
        return caches

    def _apply_adapters(self, rows: list[Row]) -> None:
        self._bank.apply(self._bank.slots([row.adapter for row in rows]))

    def _call_together(self, rows: list[Row], separate: Sequence[Caches]) -> Caches:
        todo = [row.prompt[row.cached : -1] for row in rows]
        lengths = [len(tokens) for tokens in todo]
        padding = [max(lengths) - length for length in lengths]
        caches = merge(separate)
        if any(padding):
            for cache in caches:
                cache.prepare(lengths=lengths, right_padding=padding)
        self._apply_adapters(rows)
        padded = [tokens + [0] * pad for tokens, pad in zip(todo, padding, strict=True)]
        self._model(mx.array(padded), cache=caches)
        if any(padding):
            for cache in caches:
                cache.finalize()
        start([cache.state for cache in caches])
        return caches


class _LongPrompt:
    """A prompt that is prefilled by itself, in as many calls as it takes."""

    def __init__(self, row: Row, caches: Caches) -> None:
        """`caches` hold the first `row.cached` tokens."""
        self.row = row
        self.caches = caches
        self.todo = row.prompt[row.cached : -1]
        self._running: list[Any] = []

    def call(self, model: Any, chunk: int) -> None:
        """Start on the next `chunk` tokens."""
        # The chunk before has to be done: the host is never more than one ahead, and a cancel costs one at most.
        mx.eval(self._running)
        tokens, self.todo = self.todo[:chunk], self.todo[chunk:]
        model(mx.array([tokens]), cache=self.caches)
        self._running = [cache.state for cache in self.caches]
        start(self._running)


def merge(separate: Sequence[Caches]) -> Caches:
    """Caches of several rows in one, layer by layer."""
    return [layer[0].merge(list(layer)) for layer in zip(*separate, strict=True)]
