"""What is kept of rows for others that begin the same: pieces of keys and values, and states at single lengths.

Keys and values of a run of tokens can be cut and joined, and serve every row that has these tokens at these positions.
A recurrent layer's state, and the ring of a window that has wrapped, are what they are after exactly one length.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx
import msgspec

from runner.engine.kv import begin_kernel, copy_kernel

Arrays = Sequence[mx.array]


Place = tuple[int, int]
"""Which of a piece's arrays, and which plane of it."""


class Piece(msgspec.Struct, frozen=True, eq=False):
    """Positions `start` to `stop` - 1: `arrays` [planes, heads, stop - start, …], and which planes each layer's are.

    A layer of which there are none is None.
    """

    start: int
    stop: int
    arrays: list[mx.array]
    layers: tuple[Sequence[Place] | None, ...]

    @property
    def complete(self) -> bool:
        """Whether every layer has its part, so that a row can be cut anywhere within."""
        return all(layer is not None for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return sum(array.nbytes for array in self.arrays)

    def of(self, places: Sequence[Place], tokens: int) -> list[mx.array]:
        """The first `tokens` positions of a layer's planes, [1, heads, tokens, …] each."""
        return [self.arrays[which][plane : plane + 1, :, :tokens] for which, plane in places]

    def part(self, start: int, stop: int) -> Piece:
        """A copy of positions `start` to `stop` - 1 of these."""
        cut = slice(start - self.start, stop - self.start)
        return Piece(start, stop, [mx.contiguous(array[:, :, cut]) for array in self.arrays], self.layers)


class Cut:
    """What a piece is made of: layers say what of theirs a row's positions `span` are to be copied of.

    Planes of one shape and type are copied together, into one array.
    """

    def __init__(self, row: int, span: slice) -> None:
        self.row = row
        self.span = span
        self._parts: list[mx.array | list[mx.array]] = []
        self._open: dict[tuple[tuple[int, ...], mx.Dtype], int] = {}

    def take(self, planes: Sequence[mx.array]) -> list[Place]:
        """Of these [slots, heads, capacity, …]; where in the piece they will be."""
        return [self._place(plane) for plane in planes]

    def add(self, copies: Sequence[mx.array]) -> list[Place]:
        """Of nothing: these [1, heads, tokens, …] are copies."""
        first = len(self._parts)
        self._parts += copies
        return [(first + i, 0) for i in range(len(copies))]

    def piece(self, layers: Iterable[Sequence[Place] | None]) -> Piece:
        """It, not computed yet, of `layers` that are where they were told."""
        start, stop = self.span.start, self.span.stop
        arrays = [part if isinstance(part, mx.array) else self._copied(part) for part in self._parts]
        return Piece(start, stop, arrays, tuple(layers))

    def _copied(self, planes: list[mx.array]) -> mx.array:
        if copy_kernel.applies(planes):
            # It will be needed, and nobody waits for it now.
            begin_kernel.prepare(len(planes), planes[0].dtype)
        return copy_kernel.copy(planes, [self.row], self.span.start, self.span.stop)

    def _place(self, plane: mx.array) -> Place:
        alike = plane.shape, plane.dtype
        which = self._open.get(alike, -1)
        together = self._parts[which] if which >= 0 else []
        assert isinstance(together, list)
        if which < 0 or len(together) == copy_kernel.MOST:
            which = self._open[alike] = len(self._parts)
            together = []
            self._parts.append(together)
        together.append(plane)
        return which, len(together) - 1


class State(msgspec.Struct, frozen=True, eq=False):
    """What cannot be cut, after one length: of each layer its arrays, None where pieces say all.

    The row had as many tokens as `written` before some were cut off. `foreign` are upstream's own caches, of a model
    whose caches are not understood.
    """

    written: int
    layers: tuple[Arrays | None, ...]
    foreign: list[Any] | None = None

    @property
    def arrays(self) -> list[mx.array]:
        """All of them."""
        return [array for layer in self.layers for array in layer or ()]

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return sum(array.nbytes for array in self.arrays)


class Beginning(msgspec.Struct, frozen=True, eq=False):
    """A row's first `length` tokens: pieces that follow on each other from 0 (the last may go on beyond), and the state
    where pieces alone do not do."""

    length: int
    pieces: tuple[Piece, ...]
    state: State | None = None

    @property
    def written(self) -> int:
        """Tokens that the row it was kept of had before some were cut off."""
        return self.length if self.state is None else max(self.length, self.state.written)
