"""Prompts on their way into the batch: everything but their last token, at most one chunk at a time.

Prompts that fit into one call together are prefilled together, padded on the right: a model call costs little more
for several (`sharing.py` says how wide it may be, and how long they wait for each other). A prompt longer than a chunk
is prefilled alone, chunk by chunk. A call is started a few layers a step while rows decode (`pacing.py`), so that they
wait for that much at most. The last token is left to the first decode step, so no logits of a prompt are ever computed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Final

import mlx.core as mx

from runner.engine.adapters.bank import AdapterBank
from runner.engine.adapters.layers import RowSlots
from runner.engine.kv.caches import Caches
from runner.engine.kv.kept import Beginning
from runner.engine.kv.layout import Layout
from runner.engine.memory import coming
from runner.engine.pacing import Pacing
from runner.engine.prefix_cache import PrefixCache
from runner.engine.prompt_calls import Call, LongPrompt
from runner.engine.row import Row
from runner.engine.sharing import Sharing
from runner.engine.successors import Successors
from runner.engine.traced import TracedCalls

Ready = tuple[list[Row], Caches]
"""Rows and their caches, for the batch to take."""

_Known = tuple[Row, Beginning | None]
"""A row, and what is known of its prompt."""


_LOOKING: Final = 3
"""Steps that prompts wait at most for it to be seen how long steps are without them, if they are fewer than rows."""


class Prefiller:
    """The waiting queue, first come first served, and the rows that are being prefilled.

    `active` rows have left the queue and have not joined the batch. `pacing` is to be told of every step, `successors`
    of rows that end and requests that come as well.
    """

    def __init__(
        self,
        model: Any,
        bank: AdapterBank,
        prefixes: PrefixCache,
        layout: Layout,
        has_room: Callable[[Row, int], bool],
        sharing: Sharing,
    ) -> None:
        """`layout` is the model's; `has_room` says whether there is memory for a row, in a call of so many tokens."""
        self.waiting: deque[Row] = deque()
        self.active: list[Row] = []
        self.pacing = Pacing()
        self.successors = Successors(sharing.steps)
        self.computed = 0.0
        """Tokens of prompts so far, padding included; of calls under way, as much as the layers that are started."""
        self._traced = TracedCalls(model, bank)
        self._bank = bank
        self._prefixes = prefixes
        self._layout = layout
        self._has_room = has_room
        self._sharing = sharing
        self._held = 0
        self._spent = 0
        self._room = 0
        self._decoding = 0
        self._running: Call | None = None
        self._long: LongPrompt | None = None
        self._others_turn = False

    @property
    def rows(self) -> list[Row]:
        """Every row that has not joined the batch."""
        return [*self.waiting, *self.active]

    def coming(self, free_rows: int, chunk: int) -> int:
        """Rows that join within a few steps where `free_rows` are free: those of at most a `chunk` of tokens."""
        short = islice((row for row in self.rows if row.uncached <= chunk), free_rows)
        return sum(1 for _ in short)

    def remove_ended(self) -> list[Row]:
        """Forget the rows that are done, and return them; not those that share a call with others that are not."""
        if not any(row.done for row in self.rows):
            return []
        if self._running is not None and all(row.done for row in self._running.rows):
            self._drop()
        kept = [] if self._running is None else self._running.rows
        ended = [row for row in self.rows if row.done and row not in kept]
        self.waiting = deque(row for row in self.waiting if not row.done)
        self.active = [row for row in self.active if row not in ended]
        if self._long is not None and self._long.row.done:
            self._store([self._long.row], self._long.caches)
            self._long = None
        return ended

    def abandon(self) -> list[Row]:
        """Give up what is being prefilled, after a failure; returns its rows."""
        rows, self.active, self._long = self.active, [], None
        self._drop()
        return rows

    def _drop(self) -> None:
        self._running = None
        self.pacing.dropped()

    def due(self, free_rows: int, chunk: int, decoding: int) -> bool:
        """Whether to `step` now: prompts may wait for others to share their call, while so many rows are `decoding`.

        Asked once a step of the batch.
        """
        if self._running is not None or self._long is not None:
            return True
        ready = min(free_rows, len(self.waiting))
        looks = ready < decoding and self._held < _LOOKING and not self.pacing.knows(decoding)
        if ready and (looks or (self._waits(decoding, ready, free_rows) and not self._full(ready, chunk))):
            self._held += 1
            self._spent += ready
            return False
        self._held = self._spent = 0
        return ready > 0

    def _waits(self, decoding: int, ready: int, free_rows: int) -> bool:
        expected = min(self.successors.expected, free_rows - ready)
        return self._sharing.holds(decoding, ready, self._held, self._spent, expected)

    def _full(self, ready: int, chunk: int) -> bool:
        """Whether one more prompt would not fit into a call with the first `ready`, as far as is known of them."""
        longest = max(len(row.prompt) - 1 for row in islice(self.waiting, ready))
        return longest > chunk or longest * (ready + 1) > self._sharing.tokens(chunk)

    def step(self, free_rows: int, chunk: int, room: int = 0, decoding: int = 0) -> Iterator[Ready]:
        """Start a model call, or some layers of it, without waiting for it; yields the rows that it makes ready.

        It has at most `chunk` tokens of a long prompt, or as many of several short ones as may share it. The consumer
        lets rows join the batch, which has `decoding` rows with `room` tokens each, before it asks for more.
        """
        self._room, self._decoding = room, decoding
        for ready in self._advance(free_rows, chunk):
            yield ready
            self.active = [row for row in self.active if row not in ready[0]]

    def _advance(self, free_rows: int, chunk: int) -> Iterator[Ready]:
        if self._running is not None:
            yield from self._start_layers(self._running)
            return
        # Prompts that fit into one call need not wait for all the calls of a long one: they take turns with it.
        self._others_turn = not self._others_turn
        long = self._long
        if long is None or self._others_turn:
            group = self._take(free_rows - len(self.active), chunk)
            if group:
                yield from self._begin_group(group, chunk)
                if self._long is long:
                    return
        if self._long is not None:
            slots = self._slots([self._long.row])
            yield from self._begun(self._long.call(self._traced, slots, chunk, self._width))

    def _take(self, free_rows: int, chunk: int) -> list[_Known]:
        """The first rows of the queue whose tokens fit into one call together, with what is known of their prompts.

        The first may be longer than a chunk, unless a long prompt is under way: it is then alone.
        """
        group: list[_Known] = []
        longest, most = 0, self._sharing.tokens(chunk)
        while self.waiting and len(group) < free_rows:
            row = self.waiting[0]
            beginning = self._look_up(row)
            longest = max(longest, row.uncached)
            tokens = longest * (len(group) + 1)
            if (longest > chunk or tokens > most) and (group or self._long is not None):
                break
            if not self._has_room(row, tokens if longest <= chunk else chunk):
                break
            self._prefixes.use(row.adapter_key, row.prompt[: row.cached])
            self.active.append(self.waiting.popleft())
            group.append((row, beginning))
        return group

    def _begin_group(self, group: list[_Known], chunk: int) -> Iterator[Ready]:
        if whole := [known for known in group if not known[0].uncached]:
            yield [row for row, _ in whole], self._begin(whole)
        rest = [known for known in group if known[0].uncached]
        if len(rest) == 1 and (row := rest[0][0]).uncached > chunk:
            self._long = LongPrompt(row, self._begin(rest, len(row.prompt)))
        elif rest:
            yield from self._begun(self._call_together(rest))

    def _begun(self, call: Call) -> Iterator[Ready]:
        """Have a call under way that was built in this step."""
        self._running = call
        self.pacing.begun(call.tokens, call.layers, call.prompts)
        if not self._apart(call):
            yield from self._start_layers(call)

    def _apart(self, call: Call) -> bool:
        return self.pacing.apart(self._decoding, len(call.rows) + len(self.waiting))

    def _start_layers(self, call: Call) -> Iterator[Ready]:
        """Start as many layers of the call under way as fit into this step, or else have its rows join."""
        alone, long = len(call.rows) == 1, self._long
        joining = long is None or call.rows != [long.row] or not long.todo
        was_started = call.started
        if not was_started:
            waiting = len(call.rows) + len(self.waiting)
            layers = self.pacing.layers(call.tokens, call.layers, self._decoding, waiting)
            self.computed += call.tokens * min(layers, call.left) / call.layers
            call.start(layers)
            if not call.started:
                return
            self.pacing.started()
            if joining and self._apart(call):
                return
        self._running = None
        if not joining:
            return
        if long is not None and call.rows == [long.row]:
            self._long = None
        # One of many is kept when its row ends, unless whoever asks the same again cannot begin within that.
        if alone or not self._layout.cuttable:
            self._store(call.rows, call.caches)
        yield call.rows, call.caches

    def _begin(self, group: list[_Known], reserve: int = 0) -> Caches:
        ends = [coming(row) for row, _ in group]
        longest = max(ends) if self._layout.sizes.few else max(len(row.prompt) for row, _ in group)
        reserve = max(reserve, self._sharing.room(longest, self._room))
        return self._layout.restore([beginning for _, beginning in group], reserve, ends)

    def _width(self, caches: Caches, tokens: int) -> int:
        # Where a launch was found to do, padding was as well.
        if self._layout.launch is None:
            return tokens
        before = max(caches.length(row) for row in range(caches.rows))
        return self._sharing.width(before, tokens, self._layout.prompt_reach(caches.capacity))

    def _store(self, rows: list[Row], caches: Caches) -> None:
        if self._prefixes.enabled:
            kept = [(index, row) for index, row in enumerate(rows) if row.reusable]
            self._prefixes.store_each((row.adapter_key, row.prompt[:-1], caches, index) for index, row in kept)

    def _look_up(self, row: Row) -> Beginning | None:
        hit = self._prefixes.look_up(row.adapter_key, row.prompt)
        row.cached = 0 if hit is None else hit.length
        return hit

    def _slots(self, rows: list[Row]) -> RowSlots | None:
        return self._bank.slots([row.adapter for row in rows])

    def _call_together(self, group: list[_Known]) -> Call:
        rows = [row for row, _ in group]
        todo = [row.prompt[row.cached : -1] for row in rows]
        lengths = [len(tokens) for tokens in todo]
        caches = self._begin(group)
        width = self._width(caches, max(lengths))
        padded = [tokens + [0] * (width - len(tokens)) for tokens in todo]
        self._traced(caches, mx.array(padded), self._slots(rows), lengths)
        return Call(rows, caches, len(rows) * width, len(rows))
