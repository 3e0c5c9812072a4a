"""What is kept of rows for others that begin the same: pieces of keys and values, and states at single lengths.

Keys and values of a run of tokens can be cut and joined, and serve every row that has these tokens at these positions.
A recurrent layer's state, and the ring of a window that has wrapped, are what they are after exactly one length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

Arrays = Sequence[mx.array]


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Positions `start` to `stop` - 1: of each layer its arrays [1, heads, stop - start, …], None where it has none."""

    start: int
    stop: int
    layers: tuple[Arrays | None, ...]

    @property
    def complete(self) -> bool:
        """Whether every layer has its part, so that a row can be cut anywhere within."""
        return all(layer is not None for layer in self.layers)

    @property
    def arrays(self) -> list[mx.array]:
        """All of them."""
        return [array for layer in self.layers for array in layer or ()]

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return sum(array.nbytes for array in self.arrays)

    def part(self, start: int, stop: int) -> Piece:
        """A copy of positions `start` to `stop` - 1 of these."""
        cut = slice(start - self.start, stop - self.start)
        layers = (None if layer is None else [mx.contiguous(a[:, :, cut]) for a in layer] for layer in self.layers)
        return Piece(start, stop, tuple(layers))

    def then(self, other: Piece) -> Piece:
        """A copy of these with what follows on them."""
        assert self.stop == other.start
        layers = (_joined(a, b) for a, b in zip(self.layers, other.layers, strict=True))
        return Piece(self.start, other.stop, tuple(layers))


@dataclass(frozen=True, slots=True, eq=False)
class State:
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


@dataclass(frozen=True, slots=True, eq=False)
class Beginning:
    """A row's first `length` tokens: pieces that follow on each other from 0 (the last may go on beyond), and the state
    where pieces alone do not do."""

    length: int
    pieces: tuple[Piece, ...]
    state: State | None = None

    @property
    def written(self) -> int:
        """Tokens that the row it was kept of had before some were cut off."""
        return self.length if self.state is None else max(self.length, self.state.written)


def _joined(a: Arrays | None, b: Arrays | None) -> Arrays | None:
    if a is None or b is None:
        return None
    return [mx.concatenate([first, second], axis=2) for first, second in zip(a, b, strict=True)]
