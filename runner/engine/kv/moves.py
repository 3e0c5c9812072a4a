"""Rows' keys and values that go into slots of layers' planes: those of all layers at once, by launches.

Layers whose planes are written in place by launches anyway say what is to be moved, and the others move their own. A
launch clears what lies behind the rows, too, as `Planes.clear` does. Where nothing is there yet, and all rows that
begin with something begin with the same, the planes themselves are what a launch makes (`Whole`).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import mlx.core as mx

from runner.engine.arrays import start
from runner.engine.kv import begin_kernel, copy_kernel
from runner.engine.kv.kept import Beginning, Piece, Place

Planes = Sequence[mx.array]


class Moves:
    """Rows of planes that go to others, or to other slots of the same: row `rows[i]` of them to slot `slots[i]`."""

    def __init__(self, rows: Sequence[int], slots: Sequence[int], tokens: int) -> None:
        """None of them has, or had, more than so many `tokens`. No row is a slot that another one goes to."""
        self._rows = rows
        self._slots = slots
        self._tokens = tokens
        self._alike: dict[Hashable, list[tuple[mx.array, mx.array]]] = {}

    def take(self, planes: Planes, into: Planes) -> bool:
        """Move from `planes` [slots, heads, capacity, width] to others, as long or longer; False if that cannot be."""
        pairs = [((a.shape, b.shape, a.dtype, b.dtype), (a, b)) for a, b in zip(planes, into, strict=True)]
        if not self._tokens or not all(alike in self._alike or _fit(*pair) for alike, pair in pairs):
            return False
        for alike, pair in pairs:
            self._alike.setdefault(alike, []).append(pair)
        return True

    def start(self) -> None:
        """Start it."""
        done = []
        for pairs in self._alike.values():
            for i in range(0, len(pairs), copy_kernel.MOST):
                planes, into = zip(*pairs[i : i + copy_kernel.MOST], strict=True)
                done += self._moved(planes, into)
        if done:
            start(done)

    def _moved(self, planes: Planes, into: Planes) -> list[mx.array]:
        tokens, room = min(self._tokens, planes[0].shape[2]), into[0].shape[2]
        step, done = copy_kernel.rows_at_once(into[0]), []
        for i in range(0, len(self._rows), step):
            stack = copy_kernel.copy(planes, self._rows[i : i + step], 0, tokens)
            done.append(copy_kernel.put(into, stack, self._slots[i : i + step], 0, tokens, room))
        return done


class Beginnings:
    """A piece that rows begin with, `rows` of them from `row` on: its first `tokens` positions.

    Nothing was written to their slots yet.
    """

    def __init__(self, row: int, rows: int, piece: Piece, tokens: int) -> None:
        self.row = row
        self.rows = rows
        self.tokens = tokens
        self.start_at = piece.start
        self._piece = piece
        self._into: list[dict[int, mx.array]] = [{} for _ in piece.arrays]
        self._fit: set[Hashable] = set()

    def like(self, places: Sequence[Place]) -> Planes:
        """Arrays of as many heads, as wide, and of the same types as a layer's at these places in the piece."""
        return [self._piece.arrays[which] for which, _ in places]

    def arrays(self, places: Sequence[Place]) -> list[mx.array]:
        """A layer's, [1, heads, tokens, width]."""
        return self._piece.of(places, self.tokens)

    def take(self, places: Sequence[Place], planes: Planes) -> bool:
        """Put what is at these places into planes [slots, heads, capacity, width]; False if that cannot be."""
        pairs = [
            (which, (which, array.shape, array.dtype), array) for (which, _), array in zip(places, planes, strict=True)
        ]
        if not all(alike in self._fit or _fit(self._piece.arrays[which], array) for which, alike, array in pairs):
            return False
        for (_, plane), (which, alike, array) in zip(places, pairs, strict=True):
            self._fit.add(alike)
            self._into[which][plane] = array
        return True

    def put(self) -> list[mx.array]:
        """What is to be started at once, for all that was taken."""
        slots, first = range(self.row, self.row + self.rows), self.start_at
        done = []
        for stack, into in zip(self._piece.arrays, self._into, strict=True):
            if into:
                assert list(into) == list(range(stack.shape[0])), "what was copied together is put together"
                end = first + self.tokens
                done.append(copy_kernel.put([*into.values()], stack, slots, first, self.tokens, end))
        return done


class Whole:
    """All that rows begin with, in planes that are made with it in them."""

    def __init__(self, begun: Beginning, rows: range, slots: int, room: int) -> None:
        """For planes [slots, heads, room, width], of which `rows` begin so."""
        self.layers = begun.pieces[0].layers
        """Of each layer, where in the pieces its planes are."""
        self._begun = begun
        self._rows = rows
        self._slots = slots
        self._room = room
        self._made: dict[int, list[mx.array]] = {}

    @property
    def applies(self) -> bool:
        """Whether launches can make them: the pieces say all, and have the same planes side by side."""
        pieces = self._begun.pieces
        alike = all(piece.layers == self.layers for piece in pieces)
        return (
            self._begun.state is None
            and alike
            and pieces[0].complete
            and all(begin_kernel.applies(stacks, self._slots, self._room) for stacks in self._stacks())
        )

    def planes(self, places: Sequence[Place]) -> list[mx.array]:
        """A layer's, not computed yet."""
        return [self._launched(which)[plane] for which, plane in places]

    def _stacks(self) -> list[tuple[mx.array, ...]]:
        return [*zip(*(piece.arrays for piece in self._begun.pieces), strict=True)]

    def _launched(self, which: int) -> list[mx.array]:
        if which not in self._made:
            ends = [piece.stop for piece in self._begun.pieces]
            stacks, length = self._stacks()[which], self._begun.length
            self._made[which] = begin_kernel.begin(stacks, ends, length, self._rows, self._slots, self._room)
        return self._made[which]


def _fit(lines: mx.array, plane: mx.array) -> bool:
    """Whether a launch can put lines of one into the other."""
    same = (lines.shape[1], lines.shape[3], lines.dtype) == (plane.shape[1], plane.shape[3], plane.dtype)
    return same and copy_kernel.applies([plane])
