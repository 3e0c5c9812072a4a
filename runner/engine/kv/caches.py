"""The caches of all layers, for the rows of one batch.

Rows come from `Layout.new` (empty), from beginnings that were kept of other rows, and by joining other caches; they
leave in any order. A row's cost to join or leave is its own keys and values, not the batch's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, TypeVar

import mlx.core as mx
from mlx_lm.models.cache import CacheList

from runner.engine.arrays import each, start
from runner.engine.kv import cosines
from runner.engine.kv.kept import Beginning, Cut, Piece, State
from runner.engine.kv.layer_protocol import Layer
from runner.engine.kv.moves import Beginnings, Moves, Whole
from runner.engine.kv.planes import Slots
from runner.engine.kv.positions import Positions
from runner.engine.kv.thresholded import Thresholded

Held = list[list[mx.array]]
"""What each layer holds."""

Answer = TypeVar("Answer")

Traced = tuple[Answer, Held, mx.array]
"""The answer, what layers hold after the call, and [rows] int32: tokens before the next call."""

Graph = Callable[[mx.array, mx.array, Held], Traced[Answer]]
"""Of a call with tokens [rows, count], [rows] int32 tokens before them, and what layers hold."""


Shape = tuple[int, int, int, int, int]
"""Rows, tokens of a call, slots and tokens that there is room for, and the side of a threshold."""


class NotTraceableError(Exception):
    """A layer's call depends on more than arrays."""


class Caches:
    """Rows 0 to `rows` - 1, and what each layer has cached of them. `layers` is what upstream's models take."""

    def __init__(self, positions: Positions, layers: list[Any]) -> None:
        self.layers = layers
        self._positions = positions
        self._leaves: list[Layer] = leaves_of(layers)

    @property
    def rows(self) -> int:
        """How many."""
        return self._positions.rows

    @property
    def padded(self) -> int:
        """Rows that a graph of a call is made for: a few more than there are, so that it does for those as well."""
        return self._positions.padded

    @property
    def arrays(self) -> list[mx.array]:
        """All that is on the device, to be evaluated: then all that was written is."""
        return [array for leaf in self._leaves for array in leaf.arrays]

    @property
    def by_layer(self) -> list[list[mx.array]]:
        """`arrays`, apart: computing those of the first layers computes no more than they need."""
        return [leaf.arrays for leaf in self._leaves]

    @property
    def nbytes(self) -> int:
        """Bytes, room for tokens to come included."""
        return sum(array.nbytes for array in self.arrays)

    @property
    def capacity(self) -> int:
        """Tokens that each row has room for."""
        return self._positions.capacity

    @property
    def room(self) -> tuple[int, int]:
        """Slots, and tokens that each has room for."""
        return self._positions.slots, self._positions.capacity

    def room_for(self, rows: int, tokens: int) -> tuple[int, int]:
        """The same once there are so many rows that need so much room."""
        return self._positions.room_for(rows, tokens)

    @property
    def seam(self) -> int | None:
        """A position that no piece may go across, if there is one: what comes from it on is held in another way."""
        return None if self._positions.threshold is None else self._positions.threshold.start

    def reserve(self, tokens: int) -> None:
        """Have room for `tokens` tokens a row from the next call on, where it is known that they will come."""
        self._positions.reserve(tokens)

    def narrow(self) -> bool:
        """Let go of room that rows do not need, where more is kept than that; False if there is none."""
        if not self._positions.narrow():
            return False
        for leaf in self._leaves:
            leaf.fit()
        return True

    def call(self, model: Any, tokens: mx.array, lengths: Sequence[int] | None = None) -> mx.array:
        """The model's answer [rows, count, …] to `tokens` [rows, count], which follow on what the rows have.

        Of row i, only the first `lengths[i]` tokens count; its answers to the others mean nothing.
        """
        self._positions.begin(tokens.shape[1], lengths)
        for leaf in self._leaves:
            leaf.begin()
        answer: mx.array = model(tokens, cache=self.layers)
        cosines.forget(model)
        for leaf in self._leaves:
            leaf.end()
        self._positions.end()
        return answer

    def dispatched(self) -> None:
        """Whoever started an array that depends on all that was built here says so."""
        for leaf in self._leaves:
            leaf.dispatched()

    def shape(self, count: int, lengths: Sequence[int] | None = None) -> Shape | None:
        """What decides how a call of `count` tokens for each row is computed; None if more does than such a thing.

        Calls of one shape differ by the values of arrays alone: see `call_graph`. Of row i, only `lengths[i]` count.
        """
        positions = self._positions
        positions.begin(count, lengths)
        busy = self._busy
        if not busy or not all(leaf.traceable() for leaf in busy):
            return None
        side = 0 if positions.threshold is None else positions.threshold.phase
        return positions.rows, count, positions.slots, positions.capacity, side

    def call_graph(self, graph: Graph[Answer], tokens: mx.array, rows: int | None = None) -> Answer:
        """`call`, by what `graph` makes of the tokens, the rows' starts and what each layer holds.

        Only after `shape` has returned one. When `graph` raises, nothing has changed. A graph of more `rows` than there
        are gets as many; the others have no tokens, write to slots that nobody has, and are part of the answer.
        """
        positions = self._positions
        if (more := (rows or positions.rows) - positions.rows) > 0:
            tokens = mx.concatenate([tokens, mx.zeros((more, tokens.shape[1]), dtype=tokens.dtype)])
        busy = self._busy
        held = [leaf.arrays for leaf in busy]
        try:
            answer, after, starts = graph(tokens, positions.padded_starts(positions.rows + more), held)
        except BaseException:
            after = held
            raise
        finally:
            for leaf, arrays in zip(busy, after, strict=True):
                leaf.hold(arrays)
        # With lengths, the host knows better.
        positions.end(starts if positions.lengths is None else None)
        return answer

    def trace(self, model: Any, tokens: mx.array, starts: mx.array, held: Held) -> Traced[mx.array]:
        """What a graph of a call consists of, for such arguments as `call_graph` has for it.

        Of several calls that are one graph, each has what the one before has returned. Raises NotTraceableError if a
        layer has not written and attended by its launch alone.
        """
        with self._positions.traced(starts, tokens.shape[1]):
            busy = self._busy
            for leaf, arrays in zip(busy, held, strict=True):
                leaf.hold(arrays)
                leaf.begin()
            answer: mx.array = model(tokens, cache=self.layers)
            for leaf in busy:
                leaf.end()
            if not all(leaf.traced for leaf in busy):
                raise NotTraceableError
        after = [leaf.arrays for leaf in busy]
        return answer, after, starts + each(tokens.shape[1], starts)

    def join(self, other: Caches, soon: int = 0) -> None:
        """Rows of `other` come after these, and `soon` so many more. `other` is not used any more."""
        first, more = self.rows, other._positions
        if more.capacity > self._positions.capacity:
            # They have as much room as there was here when they began, which may have been given up since.
            other.narrow()
        moves = Moves(range(more.rows), range(first, first + more.rows), max(more.written))
        self._positions.extend(more, soon)
        for mine, new in zip(self._leaves, other._leaves, strict=True):
            mine.extend(first, new, moves)
        moves.start()

    def remove(self, rows: Sequence[int]) -> list[int]:
        """Let go of rows. Returns the others in their new order: the last ones have moved into the holes."""
        order = order_without(self.rows, rows)
        holes = [row for row, before in enumerate(order) if before != row]
        last = [order[row] for row in holes]
        lifted: list[list[mx.array]] = [[] for _ in self._leaves]
        if holes:
            moves = Moves(last, holes, max(self._positions.written[row] for row in last))
            lifted = [leaf.lift(_slots(last), moves) for leaf in self._leaves]
            moves.start()
            if any(lifted):
                # At once: what still reads an array keeps it from being written in place, and each start costs the
                # host.
                start(lifted)
        self._positions.take(order)
        self._positions.fit()
        into = _slots(holes)
        for leaf, moved in zip(self._leaves, lifted, strict=True):
            leaf.take(order, into, moved)
        return order

    def mark(self) -> None:
        """Of the tokens that come from now on, some will be cut off again: see `keep`."""
        self._positions.mark()

    def keep(self, counts: mx.array) -> None:
        """Keep the first `counts` [rows] tokens since the `mark`: no copy, and no wait for the counts to be computed.

        Only if the layout is `trimmable`. `settle` has to follow.
        """
        self._positions.keep(counts)

    def settle(self, counts: Sequence[int]) -> None:
        """How many tokens the oldest `keep` that is not settled yet has cut off, of the rows as they are now (0 for
        later ones)."""
        self._positions.settle(counts)

    def length(self, row: int) -> int:
        """Tokens that a row has. Trims must be settled."""
        assert self._positions.exact
        return self._positions.most[row]

    def piece(self, row: int, start: int, stop: int) -> Piece:
        """Positions `start` to `stop` - 1 of a row, as a copy that is not computed yet: to be started before rows
        leave or join."""
        assert stop <= self.length(row)
        assert not (self.seam and start < self.seam < stop)
        cut, written = Cut(row, slice(start, stop)), self._positions.written[row]
        return cut.piece([leaf.piece(cut, written) for leaf in self._leaves])

    def state(self, row: int) -> State | None:
        """What pieces do not say of a row as it is now, as a copy that is not computed yet; None if they say all."""
        assert self._positions.exact
        written = self._positions.written[row]
        layers = tuple(leaf.state(row, written) for leaf in self._leaves)
        return None if all(layer is None for layer in layers) else State(written, layers)

    def restore(self, beginnings: Sequence[Beginning | None], reserve: int, ends: Sequence[int] = ()) -> None:
        """See Layout.restore; nothing may have been called yet."""
        lengths = [0 if begun is None else begun.length for begun in beginnings]
        written = [0 if begun is None else begun.written for begun in beginnings]
        self._positions.restart(lengths, written, ends)
        self._positions.reserve(max(reserve, *written, *ends))
        runs = [*_runs(beginnings)]
        if len(runs) == 1 and self._begin(*runs[0]):
            return
        if done := [array for run in runs for array in self._put(*run)]:
            start(done)

    @property
    def _busy(self) -> list[Layer]:
        """Those that have a part in the call that has begun."""
        return self._leaves if self.seam is None else [leaf for leaf in self._leaves if not leaf.idle]

    def _begin(self, row: int, rows: int, begun: Beginning) -> bool:
        """Have layers begin with planes that hold it; False where launches do not make those."""
        whole = Whole(begun, range(row, row + rows), self._positions.slots, self._positions.capacity)
        if not (all(leaf.begins_whole for leaf in self._leaves) and whole.applies):
            return False
        for leaf, places in zip(self._leaves, whole.layers, strict=True):
            leaf.begin_whole(whole, places or ())
        return True

    def _put(self, row: int, rows: int, begun: Beginning) -> list[mx.array]:
        """Write it, or return what is to be started for that."""
        done = []
        for piece in begun.pieces:
            part = Beginnings(row, rows, piece, min(piece.stop, begun.length) - piece.start)
            for leaf, places in zip(self._leaves, piece.layers, strict=True):
                if places:
                    leaf.put_piece(part, places)
            done += part.put()
        if begun.state is not None:
            for leaf, arrays in zip(self._leaves, begun.state.layers, strict=True):
                if arrays is not None:
                    for one in range(row, row + rows):
                        leaf.put_state(one, arrays)
        return done


def order_without(count: int, rows: Sequence[int]) -> list[int]:
    """Which of `count` rows is where once `rows` are gone: see `Caches.remove`."""
    gone = set(rows)
    left = count - len(gone)
    holes = sorted(row for row in gone if row < left)
    order = list(range(left))
    for hole, row in zip(holes, (row for row in range(left, count) if row not in gone), strict=True):
        order[hole] = row
    return order


def _slots(rows: list[int]) -> Slots:
    return rows[0] if len(rows) == 1 else mx.array(rows, dtype=mx.int32)


def _runs(beginnings: Sequence[Beginning | None]) -> Iterator[tuple[int, int, Beginning]]:
    """Rows side by side that begin with the very same: the first of them, how many, and what they begin with."""
    row = 0
    for _, run in groupby(beginnings, _what_is_kept):
        first, *others = run
        if first is not None:
            yield row, 1 + len(others), first
        row += 1 + len(others)


def _what_is_kept(begun: Beginning | None) -> tuple[int, ...]:
    return () if begun is None else (begun.length, id(begun.state), *map(id, begun.pieces))


def leaves_of(caches: Sequence[Any]) -> list[Any]:
    """The caches of layers, those that have several apart."""
    several = CacheList, Thresholded
    return [leaf for c in caches for leaf in (leaves_of(c.caches) if isinstance(c, several) else [c])]
