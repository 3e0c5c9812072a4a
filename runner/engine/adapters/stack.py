"""The stacked changes of all resident adapters to one layer, and how adapters enter and leave them."""

from __future__ import annotations

from dataclasses import dataclass, field

import mlx.core as mx


@dataclass(frozen=True, slots=True)
class Stack:
    """`a` is [slots, in, r] and `b` [slots, r, out], with an axis of experts after the slots for a layer of experts.

    `magnitude` [slots, out] is the DoRA factor of each output, ones for other adapters, None while no resident adapter
    is DoRA. Slot 0 changes nothing.
    """

    a: mx.array
    b: mx.array
    magnitude: mx.array | None
    _slices: dict[int, tuple[mx.array, mx.array, mx.array | None]] = field(default_factory=dict)

    @classmethod
    def empty(cls, slots: int, a: mx.array, b: mx.array) -> Stack:
        """`slots` slots that change nothing, each of the shapes of `a` and `b`."""
        return cls(mx.zeros((slots, *a.shape), a.dtype), mx.zeros((slots, *b.shape), b.dtype), None)

    @property
    def arrays(self) -> list[mx.array]:
        """To be evaluated."""
        return [array for array in (self.a, self.b, self.magnitude) if array is not None]

    @property
    def nbytes(self) -> int:
        """Bytes of all slots together."""
        return sum(array.nbytes for array in self.arrays)

    def slot(self, index: int) -> tuple[mx.array, mx.array, mx.array | None]:
        """`a`, `b` and `magnitude` of one slot. They are views, and cut once."""
        if index not in self._slices:
            factor = None if self.magnitude is None else self.magnitude[index]
            self._slices[index] = self.a[index], self.b[index], factor
        return self._slices[index]

    def appended(self, a: mx.array, b: mx.array, factor: mx.array | None) -> Stack:
        """With one more slot; the smaller rank is padded with zeros."""
        rank = max(self.a.shape[-1], a.shape[-1])
        return Stack(
            mx.concatenate([_padded(self.a, -1, rank), _padded(a, -1, rank)[None]]),
            mx.concatenate([_padded(self.b, -2, rank), _padded(b, -2, rank)[None]]),
            self._magnitude_with(factor),
        )

    def appended_nothing(self) -> Stack:
        """With one more slot that changes nothing."""
        zeros = mx.zeros_like(self.a[0]), mx.zeros_like(self.b[0])
        return self.appended(*zeros, None)

    def without(self, slot: int, rank: int) -> Stack:
        """One slot less, and no rank above `rank`."""

        def cut(array: mx.array) -> mx.array:
            return mx.concatenate([array[:slot], array[slot + 1 :]])

        magnitude = None if self.magnitude is None else cut(self.magnitude)
        return Stack(cut(self.a)[..., :rank], cut(self.b)[..., :rank, :], magnitude)

    def _magnitude_with(self, factor: mx.array | None) -> mx.array | None:
        if factor is None and self.magnitude is None:
            return None
        slots, outputs = self.b.shape[0], self.b.shape[-1]
        before = mx.ones((slots, outputs), self.b.dtype) if self.magnitude is None else self.magnitude
        new = mx.ones((outputs,), self.b.dtype) if factor is None else factor
        return mx.concatenate([before, new[None]])


def _padded(array: mx.array, axis: int, size: int) -> mx.array:
    missing = size - array.shape[axis]
    if not missing:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, missing)
    return mx.pad(array, widths)
