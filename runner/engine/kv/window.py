"""The cache of a layer that sees a sliding window: a ring of its last tokens, in the place of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from runner.engine.arrays import start
from runner.engine.kv import masks
from runner.engine.kv.calls import Launch
from runner.engine.kv.kept import Cut, Place
from runner.engine.kv.layers import Straight
from runner.engine.kv.masks import FEW
from runner.engine.kv.moves import Beginnings
from runner.engine.kv.planes import Form
from runner.engine.kv.positions import Positions
from runner.engine.kv.rotary import rotated


class Window(Straight):
    """Keys and values of each row's last tokens, in a ring: position p lies at place p % size.

    The ring has `slack` places beyond the `window` that a query sees, so up to as many tokens can be cut off a row's
    end, and slack + 1 can be written in one call before they are seen. Wider calls see the ring and what they bring.
    """

    def __init__(
        self,
        positions: Positions,
        window: int,
        slack: int,
        launch: Launch | None = None,
        prompt_launch: Launch | None = None,
        form: Form | None = None,
        *,
        rotates: bool = False,
    ) -> None:
        super().__init__(positions, launch, prompt_launch, form, rotates=rotates)
        self._window: int = window
        self._size = self._ring = window + slack
        self._slack = slack

    def make_mask(self, count: int, return_array: bool = False, window_size: int | None = None) -> masks.Mask:
        positions, window = self._positions, window_size or self._window
        if positions.reach <= self._size:
            made = lambda: masks.straight(positions, window, return_array)  # noqa: E731
        elif count <= self._slack + 1:
            made = lambda: masks.ring(positions, self._size, window)  # noqa: E731
        else:
            made = lambda: masks.before_and_new(positions, self._planes.capacity, self._size, window)  # noqa: E731
        return self._given(positions.once(("window", self._size, window, return_array), made), window)

    def update_and_fetch(self, keys: Any, values: mx.array) -> Any:
        positions = self._positions
        if positions.reach > self._size and positions.count > self._slack + 1:
            return self._wide(rotated(keys), values)
        return super().update_and_fetch(keys, values)

    def traceable(self) -> bool:
        count = self._positions.count
        return (count > FEW or count <= self._slack + 1) and super().traceable()

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        positions = self._positions
        keys, values = self._planes.view(positions.rows, min(positions.reach, self._size))
        return keys, values

    def _room(self) -> int:
        return min(self._positions.capacity, self._size)

    def _wide(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """What was in the ring, and what is new: both are seen before the new takes the places of the old."""
        positions, places = self._positions, self._planes.capacity
        seen = [keys, values]
        if places:
            old = self._planes.view(positions.rows, places)
            seen = [mx.concatenate([before, new], axis=2) for before, new in zip(old, seen, strict=True)]
        source = positions.once(("wide", self._size), lambda: self._after_wide(places))
        kept = [mx.take_along_axis(both, source, axis=2) for both in seen]
        if positions.slots == positions.rows:
            self._planes.arrays = kept
        else:
            self._planes.reserve(positions.slots, self._size, kept)
            self._planes.paste(0, positions.rows, kept)
        return seen[0], seen[1]

    def _after_wide(self, places: int) -> mx.array:
        """[rows, 1, size, 1]: where each place's next content is among `places` old ones and the call's own."""
        positions = self._positions
        first = positions.starts[:, None]
        added = positions.count if positions.lengths is None else mx.array(positions.lengths, dtype=mx.int32)[:, None]
        held = masks.held(first + (added - 1), self._size, self._size)
        old = mx.minimum(mx.arange(self._size), max(0, places - 1))
        return mx.where(held >= first, places + held - first, old)[:, None, :, None]

    def piece(self, cut: Cut, written: int) -> Sequence[Place] | None:
        return cut.add(self._apart(self._cut(cut.row, cut.span))) if written <= self._size else None

    def state(self, row: int, written: int) -> list[mx.array] | None:
        return None if written <= self._size else self._apart(self._cut(row, slice(0, self._size)))

    def _cut(self, row: int, span: slice) -> list[mx.array]:
        return [mx.contiguous(array[row : row + 1, :, span]) for array in self._planes.arrays]

    def put_piece(self, begun: Beginnings, places: Sequence[Place]) -> None:
        # What goes on beyond the ring is of a row that has a state, which says more.
        if begun.start_at + begun.tokens <= self._size:
            self._paste(begun.row, begun.rows, begun.arrays(places), begun.start_at)

    def put_state(self, row: int, arrays: Sequence[mx.array]) -> None:
        self._paste(row, 1, arrays, 0)

    def _paste(self, row: int, rows: int, arrays: Sequence[mx.array], start: int) -> None:
        self._planes.reserve(self._positions.slots, self._room(), arrays)
        self._planes.paste(row, rows, self._apart(arrays), start)

    def _apart(self, arrays: Sequence[mx.array]) -> list[mx.array]:
        """Copies that share no memory with the ring, which a launch writes to without MLX knowing.

        MLX's own copies share it where all of it is copied, and a write of all of it is none, but takes the new array.
        """
        if self._launch is None:
            return list(arrays)
        copies = [mx.take(array, mx.arange(array.shape[0]), axis=0) for array in arrays]
        start(copies)
        return copies
