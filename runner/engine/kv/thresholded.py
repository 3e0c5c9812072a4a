"""Keys and values that are plain up to a threshold, and packed for what comes after it (see `threshold.py`).

A layer has both: `Before` has each row's tokens up to the threshold, `After` has all tokens of rows beyond it. To the
room they are two layers, each of which joins, leaves and is kept as its class is anyway; models find a `Thresholded`,
which asks the one or the other, or where a call's queries are on both sides of the threshold, both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from runner.engine.arrays import each
from runner.engine.kv import masks
from runner.engine.kv.kept import Cut, Place
from runner.engine.kv.layers import Straight
from runner.engine.kv.masks import FEW
from runner.engine.kv.moves import Moves
from runner.engine.kv.positions import Positions
from runner.engine.kv.quantised import Quantisation, Quantised
from runner.engine.kv.quantised_kernel import PackedLaunch
from runner.engine.kv.rotary import Deferred, rotated
from runner.engine.kv.threshold import Phase, Threshold


class _Sided:
    """What takes part in calls by the side of the threshold that their queries are on."""

    _positions: Positions

    @property
    def _threshold(self) -> Threshold:
        threshold = self._positions.threshold
        assert threshold is not None
        return threshold


class Before(_Sided, Straight):
    """Plain keys and values of each row's tokens up to the threshold. [slots, heads, room, width]

    Behind these are a few places more. There rows that are beyond it write in a call that others are in, so that a
    launch needs no word for it; nobody looks at them.
    """

    def make_mask(self, count: int, return_array: bool = False, window_size: int | None = None) -> masks.Mask:
        if self._threshold.phase is Phase.BEFORE:
            return super().make_mask(count, return_array, window_size)
        positions = self._positions
        made = lambda: masks.visible(masks.queries(positions), mx.arange(self._seen_places), window_size)  # noqa: E731
        return self._given(positions.once(("before", window_size), made), window_size)

    def write(self, keys: Any, values: mx.array) -> None:
        last = None if self._threshold.phase is Phase.BEFORE else self._room() - 1
        self._planes.write(self._positions, (rotated(keys), values), last=last)

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        keys, values = self._planes.view(self._positions.rows, self._seen_places)
        return keys, values

    def beginning(self, row: int) -> list[mx.array]:
        """[1, heads, tokens, width]: what a row has here, up to the threshold; nothing if nobody has anything."""
        return [array[row : row + 1, :, : self._threshold.start] for array in self._planes.arrays]

    def window_of(self, mask: masks.Mask) -> int | None:
        """The window that a mask means which a model was given. Raises ValueError if it is a mask of its own."""
        if (seen := self._seen(mask)) is None:
            raise ValueError("the model's attention has a mask of its own, which does not say what is seen packed")
        return seen[0]

    @property
    def idle(self) -> bool:
        return self._threshold.phase is Phase.AFTER

    def piece(self, cut: Cut, written: int) -> Sequence[Place] | None:
        return super().piece(cut, written) if cut.span.stop <= self._threshold.start else ()

    @property
    def begins_whole(self) -> bool:
        # With more room than there is here, planes would be made for tokens that come after it.
        return super().begins_whole and self._positions.capacity <= self._room()

    @property
    def _seen_places(self) -> int:
        return min(self._positions.reach, self._room())

    @property
    def _launches(self) -> bool:
        # A wide call writes more than there are places behind the threshold.
        narrow = self._threshold.phase is Phase.BEFORE or self._positions.count <= FEW
        return narrow and super()._launches

    def _starts(self) -> mx.array:
        if self._threshold.phase is Phase.BEFORE:
            return super()._starts()
        return self._positions.once("starts before", self._clipped)

    def _clipped(self) -> mx.array:
        starts = self._positions.row_starts
        return mx.minimum(starts, each(self._threshold.start, starts))

    def _room(self) -> int:
        return min(self._positions.capacity, self._threshold.start + FEW)


class After(_Sided, Quantised):
    """Packed keys and values of all tokens of the rows that are beyond the threshold; of others it has room."""

    def __init__(
        self,
        positions: Positions,
        before: Before,
        quantisation: Quantisation,
        launch: PackedLaunch | None = None,
        *,
        rotates: bool = False,
    ) -> None:
        super().__init__(positions, quantisation, launch, rotates=rotates)
        self._before = before

    def begin(self) -> None:
        super().begin()
        for row in self._threshold.turning:
            if plain := self._before.beginning(row):
                packed = self._pack(*plain)
                self._planes.reserve(self._positions.slots, self._positions.capacity, packed)
                self._planes.paste(row, 1, packed)
                self._planes.clear(row, 1, max(packed[0].shape[2], self._positions.written[row]))

    @property
    def idle(self) -> bool:
        return self._threshold.phase is Phase.BEFORE

    def traceable(self) -> bool:
        # What rows' beginnings are packed by is no part of a graph.
        return not self._threshold.turning and super().traceable()

    def extend(self, first: int, other: Straight, moves: Moves) -> None:
        if other.arrays:
            super().extend(first, other, moves)
        elif not self._planes.empty:
            # What is there of others is cleared when such a row comes to the threshold.
            self._planes.reserve(self._positions.slots, self._room(), ())

    def fit(self) -> None:
        if max(self._positions.written, default=0) <= self._threshold.start:
            self._planes.drop()
        super().fit()

    def piece(self, cut: Cut, written: int) -> Sequence[Place] | None:
        return super().piece(cut, written) if cut.span.start >= self._threshold.start else ()


class Thresholded(_Sided):
    """What a model finds in the place of a layer's cache."""

    def __init__(self, positions: Positions, before: Before, after: After) -> None:
        self.before = before
        self.after = after
        self.caches = before, after
        self._positions = positions

    @property
    def used(self) -> Before | After | None:
        """The one that has all that a call's queries see; None if they see both."""
        if self._threshold.phase is Phase.ACROSS:
            return None
        return self.before if self._threshold.phase is Phase.BEFORE else self.after

    @property
    def offset(self) -> Any:
        offsets = [leaf.offset for leaf in ([self.used] if self.used else self.caches)]
        return offsets[0] if all(isinstance(offset, Deferred) for offset in offsets) else self._positions.offset

    def make_mask(self, count: int, return_array: bool = False, window_size: int | None = None) -> masks.Mask:
        return (self.used or self.before).make_mask(count, return_array, window_size)

    def update_and_fetch(self, keys: Any, values: mx.array) -> Any:
        if self.used:
            return self.used.update_and_fetch(keys, values)
        both = Both(*(leaf.update_and_fetch(keys, values) for leaf in self.caches))
        return both, both

    def joined(
        self, form: tuple[int, int, int], dtype: mx.Dtype, rope: Any, scale: float, mask: masks.Mask
    ) -> Callable[[mx.array], mx.array] | None:
        """As `Straight.joined`; none across the threshold."""
        return self.used.joined(form, dtype, rope, scale, mask) if self.used else None

    def packed_mask(self, mask: masks.Mask) -> masks.Mask:
        """Of a mask that a model was given across the threshold, what it means for packed keys. Raises ValueError if it
        is a mask of its own."""
        return self.after.make_mask(self._positions.count, window_size=self.before.window_of(mask))

    def sees_plain(self, shape: tuple[int, ...]) -> mx.array:
        """Which queries of the call are before the threshold; of that shape or one that broadcasts to it, which is that
        of what is attended to, [rows, heads, count, width]."""
        positions, start = self._positions, self._threshold.start
        if positions.count > FEW:
            return positions.once("sees plain", lambda: masks.queries(positions) < start)
        return positions.once(("sees plain", shape), lambda: _before(positions.row_starts, start, shape))


def _before(starts: mx.array, start: int, shape: tuple[int, ...]) -> mx.array:
    """Of `shape` [rows, heads, count, width]: whether query j of a row with `starts` tokens before is before `start`.

    As an array of just that shape, made of such: what broadcasts is one kernel with what comes after it in a graph that
    is kept, and a kernel that nobody had before takes seconds to compile.
    """
    rows, _, count, _ = shape
    ends = mx.array([[start - j for j in range(count)]] * rows, dtype=starts.dtype)
    before = mx.contiguous(mx.repeat(starts[:, None], count, axis=1)) < ends
    return mx.contiguous(mx.broadcast_to(before[:, None, :, None], shape))


class Both:
    """What both have of a call across the threshold: keys and values, plain and packed, or `Unwritten` of each."""

    def __init__(self, plain: tuple[Any, Any], packed: tuple[Any, Any]) -> None:
        self.plain = plain
        self.packed = packed
