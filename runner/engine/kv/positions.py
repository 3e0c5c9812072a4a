"""Where each row of a batch stands. One object serves the caches of all layers.

A row's tokens lie at positions 0 to length - 1 of its slot: nothing is padded, so nothing moves when rows of other
lengths join, and cutting a row's end off is a smaller number. What a model call needs beside the keys and values
(offsets for the rotary embedding, masks, the places to write to) depends on the positions alone, so it is made once a
call, not once a layer.

Lengths are known in two places. The host has an upper bound for each row, which is exact unless a `keep` is outstanding
whose counts the device is still computing; the device has the true ones whenever they differ between rows. While all
rows have one length and the host knows it, a call needs no arrays at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import mlx.core as mx

from runner.engine.kv.cosines import fixed
from runner.engine.kv.sizes import AS_NEEDED, Sizes, rounded
from runner.engine.kv.threshold import Threshold

T = TypeVar("T")

_SOON: Final = 256
"""Tokens that a row comes to within the next steps."""


class Positions:
    """Lengths of `rows` rows, and the model call under way.

    `slots` rows and `capacity` tokens each have room in the layers' arrays. During a call, `count` is its width in
    tokens, and `lengths` says how many of them each row really has (the rest is padding on the right), None for all.
    `pads` is whether a call may have more rows than there are. `threshold` is where rows begin to be seen packed.
    """

    def __init__(self, rows: int, sizes: Sizes = AS_NEEDED, threshold: Threshold | None = None) -> None:
        self.rows = rows
        self.pads = True
        self.threshold = threshold
        self.slots = sizes.slots(rows)
        self.capacity = 0
        self._sizes = sizes
        self._ends = [0] * rows
        self.count = 0
        self.lengths: list[int] | None = None
        self._most = [0] * rows
        self._written = [0] * rows
        self._cuts: list[int] = []
        self._offsets: mx.array | None = None
        self._made: dict[Any, Any] = {}
        self._next: mx.array | None = None
        self._padded: tuple[mx.array, mx.array] | None = None
        self._marked: tuple[mx.array, list[int]] | None = None
        self.same: int | None = 0
        """The length that all rows have, if the host knows it."""

    # ------------------------------------------------------------- lengths

    @property
    def exact(self) -> bool:
        """Whether the host knows all lengths."""
        return not self._cuts

    @property
    def most(self) -> list[int]:
        """Tokens that each row has, at most."""
        return self._most

    @property
    def written(self) -> list[int]:
        """Tokens that each row ever had, at most: what was cut off has left its traces in the places it took."""
        return self._written

    @property
    def least(self) -> int:
        """Tokens that every row has at least."""
        return max(0, min(self._most) - sum(self._cuts))

    @property
    def reach(self) -> int:
        """Tokens that the longest row has after this call, at most, its padding included."""
        return max(self._most) + self.count

    @property
    def offset(self) -> int | mx.array:
        """What upstream's models ask a cache for: tokens before this call, one number or [rows] int32."""
        return self.once("offset", lambda: fixed(self.starts, self.reach)) if self.same is None else self.same

    @property
    def starts(self) -> mx.array:
        """[rows] int32: tokens of each row before this call."""
        if self._offsets is None:
            assert self.exact
            self._offsets = mx.array(self._most, dtype=mx.int32) if self._next is None else self._next
        return self._offsets

    @property
    def row_starts(self) -> mx.array:
        """`starts`, without looking at what rows have in common: what a launch needs."""
        if self._next is not None:
            return self._next
        if self.same is not None:
            return mx.array([self.same] * self.rows, dtype=mx.int32)
        return self.starts if self.starts.dtype == mx.int32 else self.starts.astype(mx.int32)

    @property
    def padded(self) -> int:
        """Rows of a graph that does for as many as there are, and for a few more or less: within the slots.

        Rows come and go, and each number of them would want a graph of its own.
        """
        return max(self.rows, min(rounded(self.rows), self.slots)) if self.pads else self.rows

    def padded_starts(self, rows: int) -> mx.array:
        """`row_starts` of so many rows: those that are not there have no tokens."""
        starts = self.row_starts
        if self._padded is not None and self._padded[0] is starts and self._padded[1].shape[0] == rows:
            return self._padded[1]
        if rows == starts.shape[0]:
            return starts
        return mx.concatenate([starts, mx.zeros((rows - starts.shape[0],), dtype=mx.int32)])

    # ------------------------------------------------------------- calls

    def begin(self, count: int, lengths: Sequence[int] | None) -> None:
        """A model call with `count` tokens a row starts, of which row i really has `lengths[i]`."""
        self.count = count
        self.lengths = None if lengths is None or min(lengths) == count else list(lengths)
        self._made.clear()
        self.reserve(self.reach)
        if self.threshold is not None:
            self.threshold.begin(self._most, self.least, count)

    def end(self, starts: mx.array | None = None) -> None:
        """The call is built: rows are as much longer. `starts` [≥ rows] int32 of the next call, if it has made them."""
        padded = starts
        if starts is not None and starts.shape[0] > self.rows:
            starts = starts[: self.rows]
        added = self.lengths or [self.count] * self.rows
        self._most = [length + more for length, more in zip(self._most, added, strict=True)]
        self._written = list(map(max, self._most, self._written))
        if starts is not None:
            self._offsets = starts
        elif self._offsets is not None:
            self._offsets = self._offsets + (self.count if self.lengths is None else mx.array(added, dtype=mx.int32))
        self.count, self.lengths = 0, None
        if self.threshold is not None:
            self.threshold.end()
        self._changed()
        self._next = starts
        self._padded = None if starts is None or padded is None else (starts, padded)

    @contextmanager
    def traced(self, starts: mx.array, count: int) -> Iterator[None]:
        """A call of `count` tokens, which is (a part of) the one under way, is built with `starts` [rows] int32 for
        what the rows have, and with nothing else; they may be more than there are."""
        before = self.same, self._offsets, self._next, self.count, self.rows
        self.same, self._offsets, self._next, self.count, self.rows = None, starts, None, count, starts.shape[0]
        self._made.clear()
        try:
            yield
        finally:
            self.same, self._offsets, self._next, self.count, self.rows = before
            self._made.clear()

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """`make()`, made for the first layer that asks in a call, and shared by the others."""
        if key not in self._made:
            self._made[key] = make()
        made: T = self._made[key]
        return made

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens a row when the layers are written next."""
        if tokens > self.capacity:
            self.slots, self.capacity = self.room_for(self.rows, tokens)

    def room_for(self, rows: int, tokens: int, soon: int = 0) -> tuple[int, int]:
        """Slots, and tokens of each, once there are so many rows that need so much room, and `soon` some more rows."""
        sizes, slots, capacity = self._sizes, self.slots, self.capacity
        more, longer = rows > slots, tokens > capacity
        if longer:
            capacity = sizes.tokens(tokens, capacity)
        if more:
            slots = sizes.slots(rows + soon if sizes.few else rows, slots)
        if sizes.few and longer and not more:
            slots = sizes.kept(slots, sizes.slots(rows))
        if sizes.few and more and not longer:
            capacity = sizes.kept(capacity, sizes.tokens(tokens))
        return slots, capacity

    # ------------------------------------------------------------- rows

    def restart(self, lengths: list[int], written: list[int], ends: Sequence[int] = ()) -> None:
        """Rows that have `lengths` tokens and had `written`, and will come to `ends`, in the place of all.

        0 is an end that nobody knows, as are all if there are none.
        """
        self.rows = len(lengths)
        self.slots = self._sizes.slots(self.rows)
        self._most, self._offsets, self._cuts = lengths, None, []
        self._written, self._ends = written, list(ends) or [0] * self.rows
        if self.threshold is not None:
            self.threshold.restart(self.rows)
        self._changed()

    @property
    def needed(self) -> int:
        """Tokens that some row will come to; within the next steps, where its end is not known or was passed."""
        rows = zip(self._ends, self._most, strict=True)
        return max((end if end and end >= length else length + _SOON for end, length in rows), default=_SOON)

    def extend(self, other: Positions, soon: int = 0) -> None:
        """Rows of `other` come after these, and `soon` so many more: if slots are made, then for those as well."""
        if self._offsets is not None or other._offsets is not None or not (self.exact and other.exact):
            self._offsets = mx.concatenate([self.starts, other.starts])
        self._most += other._most
        self._written += other._written
        self._ends += other._ends
        self._cuts += other._cuts
        if self.threshold is not None and other.threshold is not None:
            self.threshold.extend(other.threshold)
        self.rows += other.rows
        tokens = max(self.needed, other.capacity) if self._sizes.few else other.capacity
        self.slots, self.capacity = self.room_for(self.rows, tokens, soon)
        self._changed()

    def take(self, order: list[int]) -> None:
        """Only the rows `order` stay, as it lists them."""
        self._most = [self._most[i] for i in order]
        self._written = [self._written[i] for i in order]
        self._ends = [self._ends[i] for i in order]
        if self.threshold is not None:
            self.threshold.take(order)
        if self._offsets is not None:
            self._offsets = self._offsets[mx.array(order, dtype=mx.int32)]
        self.rows = len(order)
        self._changed()

    def fit(self) -> None:
        """Ask for less room where rows need much less: half of it, or a quarter where sizes are few."""
        few, rows, needed = self._sizes.few, self.rows, self.needed
        if self.slots > (4 * rows + 8 if few else 2 * rows + 2):
            self.slots = self._sizes.slots(rows)
        if (4 if few else 2) * needed < self.capacity:
            self.capacity = self._sizes.tokens(needed)

    def narrow(self) -> bool:
        """Ask for no more room than rows need, where sizes are few; False if there is no more."""
        slots, capacity = self._sizes.slots(self.rows), self._sizes.tokens(self.needed)
        if not self._sizes.few or not (slots < self.slots or capacity < self.capacity):
            return False
        self.slots, self.capacity = min(slots, self.slots), min(capacity, self.capacity)
        return True

    def mark(self) -> None:
        """Remember what rows have, for `keep`."""
        self._next = self.row_starts
        self._marked = self._next, self._most

    def keep(self, counts: mx.array) -> None:
        """Cut off all but the first `counts` [rows] int32 tokens since the `mark`.

        The counts may not be computed yet: see `settle`.
        """
        assert self._marked is not None
        (starts, before), self._marked = self._marked, None
        self._offsets = starts + counts
        self._cuts.append(max(now - then for now, then in zip(self._most, before, strict=True)))
        self._changed()

    def settle(self, counts: Sequence[int]) -> None:
        """The host has read how much the oldest `keep` that is outstanding cut off; row by row as they are now."""
        self._most = [length - cut for length, cut in zip(self._most, counts, strict=True)]
        del self._cuts[0]
        self._changed()

    def _changed(self) -> None:
        self._made.clear()
        self._next = None
        first = self._most[0] if self._most else 0
        self.same = first if self.exact and all(length == first for length in self._most) else None
        if self.same is not None:
            self._offsets = None
