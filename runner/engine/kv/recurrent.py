"""The caches of recurrent layers, as upstream's models find them (see `layers`)."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache

from runner.engine.kv.kept import Cut, Place
from runner.engine.kv.moves import Beginnings, Moves, Whole
from runner.engine.kv.planes import Slots
from runner.engine.kv.positions import Positions


class Recurrent(ArraysCache):  # type: ignore[misc]
    """The state of a recurrent layer: a few arrays [rows, …], which upstream's layers read and replace."""

    cache: list[mx.array | None]

    def __init__(self, positions: Positions, size: int) -> None:
        super().__init__(size)
        self._positions = positions
        # A state has a line for each row, and none for those that a graph would be padded with.
        positions.pads = False

    @property
    def offset(self) -> int | mx.array:
        return self._positions.offset

    @property
    def arrays(self) -> list[mx.array]:
        return [array for array in self.cache if array is not None]

    def begin(self) -> None:
        lengths = self._positions.lengths
        self.lengths = None if lengths is None else mx.array(lengths)

    def end(self) -> None:
        pass

    traced = True

    idle = False

    def dispatched(self) -> None:
        pass

    def traceable(self) -> bool:
        # Lengths would be constants of a graph.
        return self._positions.lengths is None and all(array is not None for array in self.cache)

    def hold(self, arrays: Sequence[mx.array]) -> None:
        self.cache = list(arrays)

    def extend(self, first: int, other: Recurrent, moves: Moves) -> None:
        self.cache = [_joined(a, first, b, other._positions.rows) for a, b in zip(self.cache, other.cache, strict=True)]

    def lift(self, slots: Slots, moves: Moves) -> list[mx.array]:
        return []

    def take(self, order: list[int], holes: Slots, lifted: list[mx.array]) -> None:
        self.filter(mx.array(order, dtype=mx.int32))

    def fit(self) -> None:
        pass

    def piece(self, cut: Cut, written: int) -> Sequence[Place] | None:
        return None

    def state(self, row: int, written: int) -> list[mx.array] | None:
        return [mx.zeros((0,)) if a is None else mx.contiguous(a[row : row + 1]) for a in self.cache]

    def put_piece(self, begun: Beginnings, places: Sequence[Place]) -> None:
        raise AssertionError("it has no pieces")

    begins_whole = False

    def begin_whole(self, whole: Whole, places: Sequence[Place]) -> None:
        raise AssertionError("it has no planes")

    def put_state(self, row: int, arrays: Sequence[mx.array]) -> None:
        self.cache = [
            _put(array, self._positions.rows, row, part) for array, part in zip(self.cache, arrays, strict=True)
        ]


def _joined(a: mx.array | None, rows: int, b: mx.array | None, more: int) -> mx.array | None:
    """One after the other; a row that has not started yet has zeros."""
    like = b if a is None else a
    if like is None:
        return None
    a = mx.zeros((rows, *like.shape[1:]), dtype=like.dtype) if a is None else a
    b = mx.zeros((more, *like.shape[1:]), dtype=like.dtype) if b is None else b
    return mx.concatenate([a, b])


def _put(array: mx.array | None, rows: int, row: int, part: mx.array) -> mx.array | None:
    """`array` [rows, …], zeros if None, with `part` [1, …] as one row; a part without size says nothing."""
    if part.size:
        array = mx.zeros((rows, *part.shape[1:]), dtype=part.dtype) if array is None else array
        array[row : row + 1] = part
    return array
